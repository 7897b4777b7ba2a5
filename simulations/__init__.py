"""Several emulated institutions on one machine, with the same code as a deployment."""
