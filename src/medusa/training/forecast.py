"""Before a run begins: measures, refuses what finds no room, tells what it will take, and fits it to a budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from medusa.api import LanguageModel
from medusa.engines.transformers import TransformersBackend
from medusa.files import write_whole
from medusa.heads.config import HeadsConfig
from medusa.models import zoo
from medusa.training import speeds
from medusa.training.budget import Budget, choice, fitted, fitted_to_text, with_what_is_left
from medusa.training.config import TrainConfig
from medusa.training.data import Example
from medusa.training.estimate import (
    Place,
    Speeds,
    Work,
    check_disk,
    disk_bytes,
    free_disk,
    gain_told,
    memory_bytes,
    size,
    told,
    work_of,
)
from medusa.training.resume import RUN_FILE
from medusa.training.text import Reporter, keeps_features


@dataclass(slots=True)
class Forecast:
    """Of one run. `started` is when it began, by `time.perf_counter`; `alone`: in one process."""

    lm: LanguageModel
    shape: HeadsConfig
    out: Path
    gpu: TransformersBackend | None
    device: torch.device
    alone: bool
    reporter: Reporter
    budget: Budget | None
    started: float
    speeds: Speeds = field(default_factory=Speeds)

    def told(self, config: TrainConfig, texts: Sequence[Sequence[Example]] = ()) -> TrainConfig:
        """Says what a run will take, and gives it back as the budget fits it, which run.yaml holds then. `texts` are
        those learned from and held out, where the model does not write them.

        Raises:
            UsageError: the budget is too small. MedusaError: the disk is.
        """
        backend = self.lm.backend
        keeps = keeps_features(config.training, backend)
        place = Place(self.out, self.shape, backend.num_slots, backend.max_length, self.gpu is not None, keeps)
        work = work_of(config, place, texts)
        if work.trivial:
            return config
        if self.budget is None:
            check_disk(work, place, config.training.cache_features)
        if self.alone:
            self.reporter.stage("Measuring what it will take")
            self.speeds = speeds.measure(config, self.lm, self.shape, work, self.gpu, self.device)
        if self.budget is not None:
            spent = time.perf_counter() - self.started
            if texts:
                config = fitted_to_text(self.budget, config, place, self.speeds, spent, texts)
            else:
                config = fitted(self.budget, config, place, self.speeds, spent, work.lost)
            work = work_of(config, place, texts)
            check_disk(work, place, config.training.cache_features)
            write_whole(self.out / RUN_FILE, config.dump())
        self._say(config, place, work)
        return config

    def with_what_is_left(self, config: TrainConfig, held_out: int) -> TrainConfig:
        """Where there is a budget, as it fits the training once all before it is done; `held_out` are rows."""
        if self.budget is None:
            return config
        spent = time.perf_counter() - self.started
        config = with_what_is_left(self.budget, config, spent, held_out, self.speeds)
        write_whole(self.out / RUN_FILE, config.dump())
        return config

    def _say(self, config: TrainConfig, place: Place, work: Work) -> None:
        model = zoo.load_config(zoo.resolve(config.model, in_place=True)).get_text_config()
        more = memory_bytes(config, place, model, self.device.type)
        if self.device.type == "cuda":
            loaded, free = torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]
        else:
            loaded, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
        disk = disk_bytes(work, place), free_disk(self.out)
        for line in told(work, self.speeds if self.alone else None, (loaded + more, loaded + free), disk):
            self.reporter.say(line)
        self.reporter.say(gain_told(work, config.training.batch_size, self.shape.kind))
        if self.budget is not None:
            self.reporter.say(choice(config, self.budget))
        if config.train_base == "lora":
            self.reporter.say("Medusa-2 comes on top of that, with a second copy of the model: it was not measured.")
        if more > free:
            self.reporter.say(
                f"memory may not suffice: {size(more)} may come on top of the loaded model, and {size(free)} are free; "
                "take fewer engine.slots, or a smaller training.batch_size or heads.draft_vocab"
            )
