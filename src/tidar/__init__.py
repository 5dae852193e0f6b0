"""TiDAR: think in diffusion, talk in autoregression. See `tidar.api` for what `tidar` exports."""
