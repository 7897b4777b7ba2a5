"""The gateway: the one door between hospitals and the coordinator."""
