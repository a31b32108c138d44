#!/usr/bin/env bash
# A test CA, the server's certificate, and a key for each device:  certificates.sh FOLDER HOST DEVICE…
#   certificates.sh keys 127.0.0.1 a b c      → keys/ca.crt, keys/server.pem, keys/server.key, keys/a, keys/a.pub, …
# and keys/peers, in which a is client 0, b client 1, …: for fedlora-client --peers.
# For tests: a real federation has its server's certificate from a CA that it trusts, and each device makes its own key.
set -eu
folder=$1 host=$2
shift 2
umask 077
mkdir -p "$folder"
cd "$folder"
case $host in *[!0-9.]*) name=DNS:$host ;; *) name=IP:$host ;; esac
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=fedlora test CA" \
  -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=$host" -keyout server.key -out server.csr 2>/dev/null
printf 'subjectAltName=%s\n' "$name" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile server.ext -out server.pem 2>/dev/null
rm server.csr server.ext
number=0
: > peers
for device in "$@"; do
  ssh-keygen -q -t ecdsa -b 384 -N "" -C "$device" -f "$device"
  echo "$number $(cat "$device.pub")" >> peers
  number=$((number + 1))
done
echo "made in $folder: ca.crt (for everybody), server.pem and server.key (for the server), a key each for: $*"
