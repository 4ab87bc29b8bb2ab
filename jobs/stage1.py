"""`ray job submit --working-dir . -- python jobs/stage1.py [--config C] [key=value …]`: Stage I."""

from salad_ray.cli import job

if __name__ == "__main__":
    job("stage1")
