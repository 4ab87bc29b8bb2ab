"""`ray job submit --working-dir . -- python jobs/sweep.py [--config C] [key=value …]`: the config's sweeps."""

from salad_ray.cli import job

if __name__ == "__main__":
    job("sweep")
