"""Image classification."""

from __future__ import annotations

from data_pipeline.images import ImageSamples, open_images
from pretrain.config.recipe import Config
from pretrain.tasks.labelled import Labelled
from pretrain.tasks.task import Samples, Uses, digest, use


class ImageClasses(Labelled):
    """Image classification."""

    def __init__(self, config: Config) -> None:
        task = config.task
        self._train = open_images(task.source, task.path, "train")
        self._held = open_images(task.source, task.path, "test")
        self.source = task.path or task.source
        self.answers = self._train.classes
        self.images = len(self._train.labels)
        self.identity = digest(["images", self._train.identity, task.augment])

    def uses(self, config: Config) -> Uses:
        """How often each image is seen."""
        return {"images": use(self.images, config.train.steps * config.train.global_batch)}

    def training(self, config: Config) -> Samples:
        """Every image once per epoch, in a new order."""
        model, count = config.model, config.train.steps * config.train.global_batch
        shape = (model.image_size, model.patch_size, model.image_channels)
        return ImageSamples(self._train, *shape, config.task.augment, config.seed, count)

    def held_out(self, config: Config, everything: bool = False) -> Samples:
        """Images that are held out from training."""
        model = config.model
        samples = ImageSamples(self._held, model.image_size, model.patch_size, model.image_channels)
        if not everything:
            samples.count = min(len(samples), config.evaluation.documents)
        return samples
