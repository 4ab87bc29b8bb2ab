"""Where the training curve goes while it grows: the log, TensorBoard, `progress.json`, W&B or MLflow."""

from __future__ import annotations

import importlib
import time
from contextlib import suppress
from types import ModuleType

from salad_ray.config import Config, ConfigError
from salad_ray.console import clock, say
from salad_ray.tables import Table, write_json


class Logger:
    """Lives on the first worker only."""

    def __init__(self, config: Config, table: Table, num_steps: int) -> None:
        self.url, self.name, self.num_steps = table.url, table.name, num_steps
        self.tensorboard = None
        if keeps_tensorboard(self.url):
            from torch.utils.tensorboard import SummaryWriter  # a second, which only the first worker needs

            self.tensorboard = SummaryWriter(f"{self.url}/tensorboard")
        self.wandb = self.mlflow = None
        if config.distill.wandb_project:
            self.wandb = optional("wandb", "distill.wandb_project").init(
                project=config.distill.wandb_project, name=self.url, config=config.model_dump(), resume="allow"
            )
        if config.distill.mlflow_experiment:
            self.mlflow = optional("mlflow", "distill.mlflow_experiment")
            self.mlflow.set_experiment(config.distill.mlflow_experiment)
            self.mlflow.start_run(run_name=self.url)
        self.started: tuple[float, float] | None = None

    def write(self, row: dict[str, float]) -> None:
        """Log one row of the curve."""
        step = int(row["step"])
        if self.tensorboard is not None:
            for key, value in row.items():
                self.tensorboard.add_scalar(f"{self.name}/{key}", value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(row, step=step)
        if self.mlflow is not None:
            self.mlflow.log_metrics(row, step=step)
        eta = self._eta(step)
        note = row | {"num_steps": self.num_steps, "eta_secs": eta, "at": time.time()}
        with suppress(OSError):  # a store that fails now may work at the next note
            write_json(f"{self.url}/progress.json", note)
        mfu = f" · MFU {row['mfu']:.0%}" if "mfu" in row else ""
        text = f" (of text alone {row['text_kl']:.4f})" if "text_kl" in row else ""
        ends = f" · KL at word ends {row['word_end_kl']:.4f}" if "word_end_kl" in row else ""
        skipped = f" · {row['skipped_steps']:.0f} steps skipped" if row["skipped_steps"] else ""
        say(
            f"{self.name}: step {step}/{self.num_steps} · loss {row['loss']:.4f} · KL {row['kl']:.4f}{text} · "
            f"NLL {row['nll']:.4f}{ends} · {row['positions_per_sec']:,.0f} positions/s{mfu} · "
            f"{row['memory_gib']:.1f} GiB · waiting {row['waiting_share']:.0%}{skipped} · ETA {clock(eta)}",
            stage=self.name,
            **row,
        )

    def close(self) -> None:
        """End the curves; the next training of this process has its own."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.mlflow is not None:
            self.mlflow.end_run()

    def _eta(self, step: int) -> float:
        now = time.monotonic()
        if self.started is None:
            self.started = (step, now)
            return 0.0
        first, then = self.started
        return (now - then) / max(step - first, 1) * (self.num_steps - step)


def keeps_tensorboard(url: str) -> bool:
    """Whether TensorBoard's files are kept beside the model: its writer appends, which no object store can."""
    return "://" not in url


def where_curves_are(url: str) -> str:
    """What to look at while a stage trains into this folder."""
    return f"`tensorboard --logdir {url}/tensorboard`" if keeps_tensorboard(url) else f"{url}/progress.json"


def optional(package: str, key: str) -> ModuleType:
    """Import a tracker that only its users install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{key} is set, but {package} is not installed; `pip install {package}`, or unset it"
        ) from None
