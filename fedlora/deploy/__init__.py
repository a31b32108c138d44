"""The same experiment on real devices, through Flower's SuperLink and SuperNodes.

server.py     the ServerApp: the simulator's own `experiment.run`, its grid being the SuperLink
launch.py     the command line's side: starts it, follows it, brings its records home
courier.py    files as lines of a log, the one way back that every SuperLink offers
client.py     `fedlora-client`: one command for a device
device.py     what a device is: its data, its limits, what it makes of an experiment that it is sent
account.py    its ledger and its seed, on its own disk
memory.py     what it keeps for itself from one round to the next, there too
node.py       its SuperNode, and the process that does what messages ask for
"""
