"""Training: data, objectives, and the run. Never imports `tidar.decode`."""
