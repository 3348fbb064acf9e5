"""Labelled images as sequences of patches: scikit-learn's digits, folders, the Hub."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.records import ChoiceError, DataError

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_HELD_OUT = 0.2
"""Share of the digits that is held out from training."""


class Images:
    """Images of one split: pixels in [0, 1] by index, and their classes."""

    def __init__(self, labels: np.ndarray, classes: int, identity: str) -> None:
        self.labels, self.classes, self.identity = labels, classes, identity

    def pixels(self, index: int) -> Any:
        """A float array ``[height, width, channels]`` or a PIL image."""
        raise NotImplementedError


class _Digits(Images):
    def __init__(self, split: str) -> None:
        images, labels = _digits()
        order = np.random.default_rng(0).permutation(len(labels))
        held_out = int(len(labels) * _HELD_OUT)
        chosen = order[held_out:] if split == "train" else order[:held_out]
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        super().__init__(labels[chosen], 10, digest)
        self._images = images[chosen]

    def pixels(self, index: int) -> Any:
        return self._images[index][..., None]


@lru_cache(1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ChoiceError("the digits are scikit-learn's: pip install scikit-learn") from None
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


class _Folder(Images):
    """PATH/SPLIT/CLASS/*.jpg, classes in the order of their names."""

    def __init__(self, path: Path, split: str) -> None:
        folder = path / split
        if not folder.is_dir():
            raise ChoiceError(f"{folder}: no such folder; an ImageFolder has train/ and val/")
        classes = sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir())
        self._files = [
            file
            for name in classes
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in _EXTENSIONS
        ]
        if not self._files:
            raise ChoiceError(f"{folder}: no images in class folders")
        index = {name: number for number, name in enumerate(classes)}
        labels = np.array([index[file.parent.name] for file in self._files])
        names = "\n".join(f"{file.parent.name}/{file.name}" for file in self._files)
        super().__init__(labels, len(classes), hashlib.sha256(names.encode()).hexdigest())

    def pixels(self, index: int) -> Any:
        from PIL import Image

        try:
            return Image.open(self._files[index]).convert("RGB")
        except OSError as error:
            raise DataError(f"{self._files[index]}: not a readable image ({error})") from None


class _Hub(Images):
    """A dataset with columns ``image`` and ``label``, from the Hub or local parquet files."""

    def __init__(self, path: str, split: str) -> None:
        try:
            import datasets
        except ImportError:
            raise ChoiceError(
                "images from the Hub need the package datasets: pip install datasets"
            ) from None
        name = "train" if split == "train" else "validation"
        try:
            self._rows = datasets.load_dataset(path, split=name)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{path}: cannot be loaded ({reason})") from None
        labels = np.array(self._rows["label"])
        identity = f"{path} {name} {len(labels)} {hashlib.sha256(labels.tobytes()).hexdigest()}"
        super().__init__(labels, int(labels.max()) + 1, identity)

    def pixels(self, index: int) -> Any:
        return self._rows[index]["image"].convert("RGB")


def open_images(source: str, path: str, split: str) -> Images:
    """The images of a split (``train``, else held out).

    Raises:
        DataError: naming the folder or package that is missing.
    """
    if source == "digits":
        return _Digits(split)
    if not path:
        raise ChoiceError("task.path: not set; give the folder of images or the dataset's name")
    part = "train" if split == "train" else "val"
    return _Folder(Path(path), part) if source == "folder" else _Hub(path, part)


class ImageSamples:
    """Image number -> patches and class; training reshuffles in every epoch, by the seed."""

    def __init__(
        self,
        images: Images,
        size: int,
        patch: int,
        channels: int,
        augment: str = "none",
        seed: int | None = None,
        count: int = 0,
    ) -> None:
        """
        Args:
            seed: of the order and the augmentation; None: in order, without augmentation.
            count: samples of the whole training.
        """
        self.images, self.size, self.patch, self.channels = images, size, patch, channels
        self.augment, self.seed = augment, seed
        self.count = count if seed is not None else len(images.labels)
        self.shares = {"images": 1.0}
        self._orders = lru_cache(maxsize=2)(self._order)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_orders"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._orders = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed or 0, epoch]).permutation(len(self.images.labels))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Patches ``[patches, values]`` float32 in [-1, 1] and the class ``[1]`` int64."""
        index = number
        if self.seed is not None:
            epoch, place = divmod(number, len(self.images.labels))
            index = int(self._orders(epoch)[place])
        label = np.array([self.images.labels[index]], np.int64)
        return self._patches(self._prepared(self.images.pixels(index), number)), label

    def _prepared(self, image: Any, number: int) -> np.ndarray:
        if isinstance(image, np.ndarray):
            pixels = image
        else:
            pixels = self._cropped(image, np.random.default_rng([self.seed or 0, 1, number]))
        if self.augment == "randaugment" and self.seed is not None:
            pixels = _rand_augment(pixels, self.seed, number)
        if pixels.shape != (self.size, self.size, self.channels):
            raise ChoiceError(
                f"an image is {pixels.shape}, but model.image_size and image_channels need "
                f"{(self.size, self.size, self.channels)}"
            )
        return pixels * 2 - 1

    def _cropped(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        """A random part of the image, perhaps mirrored; without augmentation, its middle."""
        from PIL import Image

        width, height = image.size
        if self.augment == "none" or self.seed is None:
            side = min(width, height) * 0.875
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
        else:
            box = _random_box(width, height, rng)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, np.float32) / 255
        mirrored = self.seed is not None and self.augment != "none" and rng.random() < 0.5
        return pixels[:, ::-1] if mirrored else pixels

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        side, patch = self.size // self.patch, self.patch
        cut = pixels.reshape(side, patch, side, patch, self.channels).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(cut.reshape(side * side, -1), np.float32)


def _random_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Inception's crop: 8-100 % of the area, aspect 3/4-4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _rand_augment(pixels: np.ndarray, seed: int, number: int) -> np.ndarray:
    """kornia's RandAugment, two operations of magnitude 9; depends only on (seed, number)."""
    import torch

    try:
        from kornia.augmentation.auto import RandAugment
    except ImportError:
        raise ChoiceError("RandAugment needs kornia: pip install kornia") from None
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
        out = RandAugment(n=2, m=9)(image)[0].clamp(0, 1)
    turned: np.ndarray = out.permute(1, 2, 0).numpy()
    return turned
