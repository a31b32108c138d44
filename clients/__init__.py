"""What runs on a client: a Flower ClientApp, the same in a simulation and on a device."""
