"""Training: data, the joint loss, and the run. Never imports `tidar.decode`."""
