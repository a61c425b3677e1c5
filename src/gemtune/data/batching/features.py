"""The media of the rows of a batch as model inputs."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence

import numpy as np
import torch

from gemtune.data.rendering.chat import Example

_FLAT_FRAMES_FROM = (5, 19)


def media_inputs(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """All media in the order of their placeholders; nothing for a kind that no row has.

    - pixel_values [N, P, 3 * patch**2] float32 and image_position_ids [N, P, 2] int64, padded to
      the largest image of the batch only (positions with -1);
    - pixel_values_videos [F, P, 3 * patch**2] and video_position_ids [F, P, 2], the frames of all
      videos one after another, and num_frames_per_video [V] int64. Until transformers 5.19 frames
      have an axis of videos before them and no numbers: there they are given as one video, which
      is taken apart in the same way;
    - input_features [A, T, 128] float32 and input_features_mask [A, T] bool, padded to the longest.
    """
    inputs: dict[str, torch.Tensor] = {}
    images = [image for example in examples for image in example.images]
    if images:
        pixels, positions = _patches(
            [image.pixels for image in images], [image.positions for image in images]
        )
        inputs |= {"pixel_values": pixels, "image_position_ids": positions}
    videos = [video for example in examples for video in example.videos]
    if videos:
        pixels, positions = _patches(
            [frame for video in videos for frame in video.pixels],
            [frame for video in videos for frame in video.positions],
        )
        if frames_are_flat():
            counts = torch.tensor([len(video.pixels) for video in videos])
            inputs["num_frames_per_video"] = counts
        else:
            pixels, positions = pixels.unsqueeze(0), positions.unsqueeze(0)
        inputs |= {"pixel_values_videos": pixels, "video_position_ids": positions}
    audios = [audio for example in examples for audio in example.audios]
    if audios:
        shape = (len(audios), max(len(audio.mask) for audio in audios))
        features = np.zeros((*shape, audios[0].features.shape[1]), dtype=np.float32)
        mask = np.zeros(shape, dtype=bool)
        for number, audio in enumerate(audios):
            features[number, : len(audio.features)] = audio.features
            mask[number, : len(audio.mask)] = audio.mask
        inputs["input_features"] = torch.from_numpy(features)
        inputs["input_features_mask"] = torch.from_numpy(mask)
    return inputs


@functools.cache
def frames_are_flat() -> bool:
    """Whether this release of transformers has the frames of all videos on one axis."""
    major, minor, *_ = importlib.metadata.version("transformers").split(".")
    return (int(major), int(minor)) >= _FLAT_FRAMES_FROM


def _patches(
    pixels: Sequence[np.ndarray], positions: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of unequal numbers of patches as [N, P, ...], and their positions."""
    shape = (len(pixels), max(map(len, pixels)))
    padded = np.zeros((*shape, pixels[0].shape[1]), dtype=np.float32)
    places = np.full((*shape, 2), -1, dtype=np.int64)
    for number, (own, where) in enumerate(zip(pixels, positions, strict=True)):
        padded[number, : len(own)] = own
        places[number, : len(where)] = where
    return torch.from_numpy(padded), torch.from_numpy(places)
