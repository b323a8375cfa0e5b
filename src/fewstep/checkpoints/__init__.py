"""Files on disk, in diffusers' folder layout: configs, where files lie, weights."""
