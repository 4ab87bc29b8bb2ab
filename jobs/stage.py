"""`ray job submit --working-dir . -- python jobs/stage.py NAME [--config C] [key=value …]`: one stage."""

import sys

from salad_ray.cli import job

if __name__ == "__main__":
    job(sys.argv.pop(1) if len(sys.argv) > 1 else "")
