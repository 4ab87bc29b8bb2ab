"""`ray job submit --working-dir . -- python jobs/run.py [--config C] [key=value …]`: the whole pipeline."""

from salad_ray.cli import job

if __name__ == "__main__":
    job("run")
