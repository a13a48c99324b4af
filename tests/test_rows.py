"""Packed rows: the loss and gradients of padded ones, and what shares a row."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

from minifp4 import AdamW, chat, fused
from minifp4.loss import IGNORE
from minifp4.rows import Rows, Spans, fill
from minifp4.step import Step

PAD = 1


def examples(lengths, seed=0):
    """[(ids, labels)] of which some second half is learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 800, (length,), generator=generator).tolist()
        made.append((ids, [IGNORE] * (length // 2) + ids[length // 2 :]))
    return made


SOME = examples([5, 17, 9, 30, 2])


def gradients(model, batches):
    """(loss, {name: gradient}) of a step, without its update."""
    model.zero_grad()
    step = Step(model, AdamW(model.named_parameters()))
    loss = step.accumulate(batches)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("parts", [1, 2], ids=["", "accumulation"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_packed_row_learns_what_padded_rows_learn(tied, parts, recomputed):
    model = small_model(tie_word_embeddings=tied)
    model.model.activation_checkpointing = recomputed
    rows = Rows(SOME, PAD, size=80)
    halves = [SOME[:3], SOME[3:]] if parts == 2 else [SOME]
    loss, expected = gradients(model, [chat.collate(some, PAD) for some in halves])
    packed, found = gradients(model, [rows.laid(some, "cpu") for some in halves])
    assert abs(loss - packed) < 1e-6 * loss
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-6 * gradient.norm() + 1e-9, name


def test_no_conversation_sees_another():
    """What is said in one changes nothing in those after it, which a row without spans would."""
    model, rows = small_model(), Rows(SOME, PAD, size=80)
    other = [(examples([5], seed=1)[0]), *SOME[1:]]
    (a, _, spans), (b, _, _) = rows.laid(SOME, "cpu"), rows.laid(other, "cpu")
    with torch.no_grad():
        one, two = (model.model(ids, spans=spans)[:, 5:63] for ids in (a, b))
        assert torch.equal(one, two)
        assert not torch.equal(*(model.model(ids)[:, 5:63] for ids in (a, b)))


def test_transformers_sees_a_packed_row_as_we_do():
    """It makes its mask from positions that start anew."""
    transformers = pytest.importorskip("transformers")
    model, (ids, _, spans) = small_model(quantize=False), Rows(SOME, PAD, size=80).laid(SOME, "cpu")
    config = {name: value for name, value in vars(model.config).items() if name != "source"}
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config, rope_parameters=rope))
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = theirs(input_ids=ids, position_ids=spans.positions(80).long(), use_cache=False).logits
        found = model.lm_head(model.model(ids, spans=spans))
    assert (found - logits).abs().max() < 1e-4 * logits.abs().max()


def test_the_parts_of_a_step_joined_are_the_parts():
    """`--step-in-backward` cannot wait for the next part, and takes all as one row."""
    model, rows = small_model(), Rows(SOME, PAD, size=32)
    loss, expected = gradients(model, rows.mine(range(3), "cpu"))
    joined = rows.mine(range(3), "cpu", joined=True)
    assert [ids.shape for ids, *_ in joined] == [(1, 96)]
    found, gradient = gradients(model, joined)
    assert abs(loss - found) < 1e-6 * loss
    assert all((gradient[name] - g).norm() < 1e-6 * g.norm() + 1e-9 for name, g in expected.items())


def test_positions_start_anew():
    spans = Spans(torch.tensor([0, 3, 5, 9, 9, 9], dtype=torch.int32), 4)
    assert spans.positions(9).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize("mode", ["random", "sequential"])
def test_each_epoch_has_each_conversation_once(mode):
    lengths = torch.randint(2, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows(examples(lengths), PAD, size=128, mode=mode, seed=3)
    orders = []
    for epoch in range(2):
        found = rows.epoch(epoch)
        assert sorted(place for row in found for place in row) == list(range(200))
        assert all(sum(lengths[place] for place in row) <= 128 for row in found)
        orders.append(found)
    assert (orders[0] == orders[1]) == (mode == "sequential")
    full = sum(lengths) / (128 * len(orders[0]))
    assert full > 0.95, full


def test_a_row_is_a_function_of_seed_and_number():
    """So a run that resumes needs to remember nothing of its data."""
    first, again = (Rows(SOME * 20, PAD, size=64, seed=7) for _ in range(2))
    before = [first.chosen(number) for number in range(60)]
    assert [again.chosen(number) for number in reversed(range(60))] == before[::-1]
    assert [Rows(SOME * 20, PAD, size=64, seed=8).chosen(number) for number in range(60)] != before


def test_by_count_it_is_the_same_sample_as_ever():
    rows = Rows(SOME, PAD, count=3, seed=5)
    for number in range(6):
        found = [SOME[place] for place in rows.chosen(number)]
        assert found == chat.sample(SOME, number, batch_size=3, seed=5)
        ids, labels, spans = rows.batch(number)
        assert ids.shape[1] == sum(len(one) for one, _ in found) == spans.starts[-1]


def test_fill_takes_the_first_row_with_room():
    assert fill([5, 6, 3, 4, 2], range(5), 10) == [[0, 2, 4], [1, 3]]


def test_what_fits_into_no_row_is_an_error():
    with pytest.raises(ValueError, match="a conversation of 30 tokens does not fit into a row of 16"):
        Rows(SOME, PAD, size=16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("in_backward", [False, True], ids=["", "step in backward"])
def test_on_a_gpu_a_recorded_row_is_the_row(in_backward):
    """Attention in one kernel, the step recorded: the updates of the plain step within bf16, and other rows
    replay through the same recording."""
    some = examples(torch.randint(5, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist())
    rows, losses = Rows(some, PAD, size=256), []
    for recorded in (False, True):
        model = small_model().cuda()
        model.set_compute_dtype(torch.bfloat16)
        step = Step(model, AdamW(model.named_parameters(), lr=1e-3), in_backward=in_backward)
        if recorded:
            fused.fuse(model, step.optimizer)
            recorder = fused.record(step)
        losses.append([step([rows.batch(number, "cuda")])[0].item() for number in range(6)])
    assert len(recorder.recorded) == 1
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    alone = [F.cross_entropy(model(torch.tensor([ids], device="cuda"))[0, :-1].float(),
                             torch.tensor(labels[1:], device="cuda"), reduction="sum")
             for ids, labels in (some[place] for place in rows.chosen(9))]  # fmt: skip
    ids, labels, spans = rows.batch(9, "cuda")
    together = model.loss(ids, labels, spans=spans) * (labels != IGNORE).sum()
    assert together.item() == pytest.approx(sum(alone).item(), rel=5e-3)
