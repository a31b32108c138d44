"""The same experiment on real devices, through Flower's SuperLink and SuperNodes.

server.py       the ServerApp: the simulator's own `experiment.run`, its grid being the SuperLink
launch.py       the command line's side: starts it, follows it, brings its records home
courier.py      files as lines of a log, the one way back that every SuperLink offers
client.py       `fedlora-client`: one command for a device
preview.py      what it says before it connects
device.py       which messages a device answers, and the one way to the work
experiment.py   what an experiment is to a device, and what a message of it may say
holdings.py     what belongs to the device and never comes from a server
limits.py       what its owner allows: privacy, memory, time
reasons.py      the fixed sentences with which it refuses
account.py      its ledger and its secret, on its own disk; the permits and keys of trainings
book.py         a file of lines that a full disk or a kill leaves whole
folder.py       a folder that its owner alone may read
memory.py       what it keeps for itself from one round to the next, there too
node.py         its SuperNode, and the process that does what messages ask for
"""
