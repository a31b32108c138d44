#!/usr/bin/env bash
# A test CA, the server's certificate, and a key for each device:  certificates.sh FOLDER HOST DEVICE…
#   certificates.sh keys 127.0.0.1 a b c      → keys/ca.crt, keys/server.pem, keys/server.key, keys/a, keys/a.pub, …
# and keys/peers, in which a is client 0, b client 1, …: for fedlora-client --peers.
# What is there already stays as it is. So the same command with one more device adds that device, and changes no other file:
#   certificates.sh keys 127.0.0.1 d          → keys/d, keys/d.pub, and a line in keys/peers: d is client 3
# For tests: a real federation has its server's certificate from a CA that it trusts, and each device makes its own key.
set -eu
if [ $# -lt 2 ]; then
  echo "usage: $0 FOLDER HOST DEVICE…" >&2
  exit 2
fi
folder=$1 host=$2
shift 2
for device in "$@"; do
  case $device in
    '' | *[!A-Za-z0-9._-]* | .* | -* | peers | ca.* | server.* | *.pub | *.tmp)
      echo "error: $device cannot be the name of a device: use letters, digits, . _ and -, and not a name of another file" >&2
      exit 2 ;;
  esac
done
umask 077
mkdir -p "$folder"
cd "$folder"
new=$(mktemp -d .new.XXXXXX)  # what is made comes into place whole, in one move
trap 'rm -rf "$new"' EXIT
case $host in *[!0-9.]*) name=DNS:$host kind=-checkhost ;; *) name=IP:$host kind=-checkip ;; esac
make_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1"; }

if [ ! -f ca.crt ]; then
  [ -f ca.key ] || { make_key "$new/ca.key" && mv "$new/ca.key" ca.key; }
  openssl req -x509 -new -key ca.key -days 365 -subj "/CN=fedlora test CA" -out "$new/ca.crt"
  mv "$new/ca.crt" ca.crt
fi
if [ -f server.pem ] && openssl x509 -in server.pem -noout "$kind" "$host" | grep -q "does NOT match"; then
  echo "error: $folder/server.pem is for another host than $host; remove it to make a new one, which the server is then to be \
started with" >&2
  exit 2
fi
if [ ! -f server.pem ]; then
  [ -f ca.key ] || { echo "error: $folder/ca.key is missing, so that no certificate can be made for $host" >&2; exit 2; }
  [ -f server.key ] || { make_key "$new/server.key" && mv "$new/server.key" server.key; }
  openssl req -new -key server.key -subj "/CN=$host" -out "$new/server.csr"
  printf 'subjectAltName=%s\n' "$name" > "$new/server.ext"
  openssl x509 -req -in "$new/server.csr" -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 16)" -days 365 \
    -extfile "$new/server.ext" -out "$new/server.pem" 2>/dev/null
  mv "$new/server.pem" server.pem
fi

touch peers
added=
for device in "$@"; do
  if [ ! -f "$device" ]; then
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$device" -f "$new/$device"
    mv "$new/$device.pub" "$device.pub"
    mv "$new/$device" "$device"
    added="$added $device"
  fi
  key=$(ssh-keygen -y -f "$device" | cut -d " " -f 1,2)
  grep -qF "$key" peers || echo "$(wc -l < peers | tr -d ' ') $key $device" >> peers
done
echo "in $folder: ca.crt (for everybody), server.pem and server.key (for the server), and a key for each device; new:${added:- none}"
