"""Batches are cut and placed whole, and studies serve where they have what it takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainings import ANY, COMPUTE, LAST, start_training, write_case, write_cases

from crossmr.training.batches import ImageBatch
from crossmr.training.shared import cut, in_chunks
from crossmr.training.stages import SynthesisBatch


@pytest.fixture
def cases(tmp_path):
    return write_cases(tmp_path / "cases")


def test_a_batch_is_cut_part_by_part():
    images, truth, lesion = (torch.rand(5, channels, 4, 4) for channels in (2, 1, 1))
    batch = SynthesisBatch(images, torch.rand(5, 2), truth, torch.rand(5, 1), lesion, None)
    part = cut(batch, slice(1, 3))
    assert type(part) is SynthesisBatch
    assert torch.equal(part.neighbours, batch.neighbours[1:3])
    assert torch.equal(part.target_mask, batch.target_mask[1:3])
    assert torch.equal(part.lesion, batch.lesion[1:3])
    assert part.y_0 is None


def test_two_dimensional_images_are_placed_channels_last():
    images = torch.rand(2, 3, 8, 8)
    volumes, lesion = torch.rand(2, 3, 4, 8, 8), torch.rand(2, 1, 8, 8)
    batch = COMPUTE.to_device(ImageBatch(images, torch.rand(2, 3), torch.tensor([0, 1]), volumes, lesion))
    assert torch.equal(batch.images, images)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.neighbours.is_contiguous()


def test_chunks_get_smaller_where_memory_runs_out():
    def run(some: slice) -> int:
        if some.stop - some.start > 3:
            raise torch.OutOfMemoryError("out of memory")
        return some.stop - some.start

    assert in_chunks(run, 10, 4) == [2] * 5
    assert in_chunks(lambda some: some.stop, 20) == [16, 20]


def test_studies_serve_that_have_what_a_c_unet_needs(cases, tmp_path: Path):
    cases["train"] += (write_case(tmp_path / "more", "E", ("t1n", "t2w")), write_case(tmp_path / "more", "F", ("t1c",)))
    training, _ = start_training(tmp_path, cases, LAST)
    assert [case.name for case in training.usable(training.train)] == ["A", "B", "D"]
    training, _ = start_training(tmp_path, cases, ANY)
    assert [case.name for case in training.usable(training.train)] == ["A", "B", "C", "D", "E"]


def test_batches_of_a_stage_are_as_its_recipe_says(cases, tmp_path: Path):
    training, _ = start_training(tmp_path, cases, ANY)
    plain = training.batches("synthesis", cases["train"], training.config.modalities)
    assert (plain.size, plain.batch_size, plain.context, plain.augmented) == ((16, 16), 6, 3, 4)
    assert len(plain.epoch_items) == len(plain.items) == 16
    masked = training.batches("representation", cases["train"], ("t1n",), masked=True)
    assert (masked.context, masked.augment) == (1, None)


def test_slices_of_lesions_are_drawn_as_often_as_the_recipe_says_but_not_to_be_masked(cases, tmp_path: Path):
    training, _ = start_training(tmp_path, cases, replace(LAST, lesion_draws=3))
    batches = training.batches("synthesis", cases["train"], training.config.modalities)
    assert len(batches.items) == 16
    assert len(batches.epoch_items) == 16 + 2 * 3  # slice 1 of A, B and C; D has no labels
    masked = training.batches("representation", cases["train"], training.config.represented, masked=True)
    assert masked.epoch_items == masked.items
