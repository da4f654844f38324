"""Steps of arbitrary rows over paged keys and values: what a row gets depends on no other row, bit for bit."""

from __future__ import annotations

import os

import pytest
import torch
from test_native import ATTENTION, model

from octavo.infer import native, packing
from octavo.infer.native import Memory, NativeModel, library, packed
from octavo.nn.contracts import Inputs

BLOCK = 4
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [7], [9, 8, 3, 3], [3] * 19]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    if library()[0] is None:
        pytest.skip(library()[1])


class Pages:
    """A pool for some sequences, filled by native steps."""

    def __init__(self, made: NativeModel, dtype: torch.dtype, *, shuffled: bool = False, block_size: int = BLOCK):
        self.made, self.block_size = made, block_size
        n_max = 64 // block_size
        n_blocks = 1 + len(PROMPTS) * n_max
        order = torch.randperm(n_blocks - 1) if shuffled else torch.arange(n_blocks - 1)
        self.tables = (1 + order).view(len(PROMPTS), n_max).int()
        shape = (n_blocks * block_size, *made.heads)
        self.keys, self.values = ([torch.randn(shape).to(dtype) for _ in range(made.n_layers)] for _ in range(2))

    @property
    def memory(self) -> Memory:
        return Memory(self.made, self.keys, self.values)

    def step(self, rows: list[tuple[int, int, int]], first: int = 0, wanted: list[int] | None = None):
        """Rows of (sequence, slot, token)."""
        sequence, slots, tokens = torch.tensor(rows).T.contiguous()
        wanted = list(range(len(rows))) if wanted is None else wanted
        return self.made.step(
            tokens, sequence, slots, slots - first, self.tables, self.block_size,
            torch.full_like(slots, first), self.memory, torch.tensor(wanted, dtype=torch.long),
        )  # fmt: skip


def one_by_one(pages: Pages) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (s, i): pages.step([(s, i, token)])[0] for s, prompt in enumerate(PROMPTS) for i, token in enumerate(prompt)
    }


FORMATS = [("model", torch.float32), ("model", torch.bfloat16), ("bf16", torch.float32)]
FORMATS += [("int8", torch.float32), ("int4", torch.bfloat16)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("weights", "dtype"), FORMATS)
def test_a_row_gets_the_same_alone_in_a_batch_and_in_a_piece_of_a_prompt(weights, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = NativeModel(model().to(dtype), weights)
        alone = one_by_one(Pages(made, dtype))
        together = Pages(made, dtype)
        for i in range(max(map(len, PROMPTS))):  # one token of every sequence that has one
            rows = [(s, i, prompt[i]) for s, prompt in enumerate(PROMPTS) if i < len(prompt)]
            for row, logits in zip(rows, together.step(rows), strict=True):
                assert torch.equal(logits, alone[row[:2]]), row
        pieces = Pages(made, dtype, shuffled=True)
        everything = [(s, i, token) for s, prompt in enumerate(PROMPTS) for i, token in enumerate(prompt)]
        for start in range(0, len(everything), 13):  # ends of some prompts and beginnings of others in one step
            rows = everything[start : start + 13]
            for row, logits in zip(rows, pieces.step(rows), strict=True):
                assert torch.equal(logits, alone[row[:2]]), row
        backwards = Pages(made, dtype).step(everything[::-1])  # the order of rows says nothing
        for row, logits in zip(everything[::-1], backwards, strict=True):
            assert torch.equal(logits, alone[row[:2]]), row
    finally:
        torch.set_num_threads(before)


def test_shuffled_blocks_are_a_contiguous_state_bit_for_bit():
    one = model()
    made = NativeModel(one)
    state = one.new_state(2, 40)
    tables = torch.arange(2, dtype=torch.int32)[:, None]
    pages = Pages(made, torch.float32, shuffled=True)
    keys, values = ([state.layers[f"{i}.mixer"].buffers[n].flatten(0, 1) for i in range(3)] for n in ("k", "v"))
    for i in range(11):
        slots = torch.tensor([i, i])
        numbers = torch.tensor([PROMPTS[0][i], PROMPTS[3][i]]), torch.tensor([0, 1]), slots, slots
        whole = made.step(*numbers, tables, 41, torch.zeros(2).long(), Memory(made, keys, values), torch.arange(2))
        assert torch.equal(whole, pages.step([(0, i, PROMPTS[0][i]), (3, i, PROMPTS[3][i])]))


@torch.inference_mode()
def test_a_whole_prompt_is_what_the_model_says():
    one = model()
    pages = Pages(NativeModel(one), torch.float32, shuffled=True)
    found = pages.step([(3, i, token) for i, token in enumerate(PROMPTS[3])])
    own = one(Inputs(torch.tensor([PROMPTS[3]]))).logits[0]
    torch.testing.assert_close(found, own, atol=2e-5, rtol=1e-4)


def test_only_wanted_rows_have_logits_in_their_order():
    made = NativeModel(model())
    rows = [(3, i, token) for i, token in enumerate(PROMPTS[3])]
    every = Pages(made, torch.float32).step(rows)
    some = Pages(made, torch.float32)
    assert torch.equal(some.step(rows, wanted=[18, 2, 2]), every[[18, 2, 2]])
    assert some.step(rows[:1], wanted=[]).shape == (0, 53)
    assert torch.equal(some.step([(3, 18, 3)]), every[-1:])  # the keys are there all the same


def test_a_row_reads_from_its_first_slot_on():
    made = NativeModel(model())
    text = [5, 6, 7]
    later = Pages(made, torch.float32)  # what lies before is noise
    found = later.step([(0, 9 + i, token) for i, token in enumerate(text)], first=9)
    own = Pages(made, torch.float32).step([(0, i, token) for i, token in enumerate(text)])
    assert torch.equal(found, own)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": 53}, "tokens"),
        ({"tokens": -1}, "tokens"),
        ({"sequence": 4}, "sequence"),
        ({"slots": 64}, "slots"),
        ({"positions": -1}, "positions"),
        ({"first": 1}, "first"),
        ({"wanted": 1}, "wanted"),
        ({"tables": 10_000}, "tables"),
        ({"tables": -1}, "tables"),
    ],
)
def test_numbers_outside_of_what_they_count_are_refused(change, why):
    pages = Pages(NativeModel(model()), torch.float32)
    names = ("tokens", "sequence", "slots", "positions", "first", "wanted")
    numbers = {name: torch.tensor([change.get(name, 0)]) for name in names}
    if "tables" in change:
        pages.tables[0, 0] = change["tables"]
    with pytest.raises(ValueError, match=f"a number of {why} is outside"):
        pages.made.step(tables=pages.tables, block_size=BLOCK, memory=pages.memory, **numbers)


def test_pools_that_do_not_fit_are_refused():
    pages = Pages(NativeModel(model()), torch.float32)
    pages.keys = [key[:, :1].contiguous() for key in pages.keys]
    with pytest.raises(ValueError, match="do not fit the model"):
        pages.step([(0, 0, 1)])
    for changed in (lambda key: key[1:], lambda key: key.bfloat16(), lambda key: key.mT.contiguous().mT):
        other = Pages(NativeModel(model()), torch.float32)
        other.keys = [changed(key) for key in other.keys]
        with pytest.raises(ValueError, match="pools of several shapes"):
            other.step([(0, 0, 1)])


class Rings:
    """A windowed model on rings of 4 entries and one that takes nothing, with room behind them for ``aside`` tokens."""

    def __init__(self, aside: int):
        torch.manual_seed(0)
        one = model(blocks={"block": {"mixer": ATTENTION | {"window": 4}}})
        self.made, n_layers = NativeModel(one), one.config.n_layers
        shape = 2 - -aside // 5, 5, *self.made.heads
        self.keys, self.values = ([torch.zeros(shape) for _ in range(n_layers)] for _ in range(2))
        self.rings = [(torch.full((2, 5), -1), torch.full((2, 5), -1)) for _ in range(n_layers)]

    def step(self, asked: list[tuple[int, int, int]]) -> torch.Tensor:
        """Tokens as (row, slot, token)."""
        rows, slots, tokens = torch.tensor(asked).T
        zeros, tables = torch.zeros_like(rows), torch.zeros(len(asked), 1, dtype=torch.int32)
        memory, wanted = Memory(self.made, self.keys, self.values, self.rings), torch.arange(len(asked))
        return self.made.step(tokens, zeros, slots, slots, tables, 1, zeros, memory, wanted, rows=rows)


@torch.inference_mode()
def test_rings_are_read_the_same_in_parts_of_any_size():
    """Parts longer than the ring, beginning anywhere in it, beside those of another text."""
    texts = [[(7 * i + row) % 53 for i in range(17)] for row in range(2)]
    single, parts = Rings(0), Rings(20)
    alone = [[single.step([(row, i, token)])[0] for i, token in enumerate(text)] for row, text in enumerate(texts)]
    for cuts in (((0, 3), (0, 1)), ((3, 11), (1, 2)), ((11, 12), (2, 14)), ((12, 17), (14, 17))):
        asked = [(row, i, texts[row][i]) for row, (a, b) in enumerate(cuts) for i in range(a, b)]
        for (row, i, _), logits in zip(asked, parts.step(asked), strict=True):
            assert torch.equal(logits, alone[row][i]), (row, i)
    for ours, theirs in zip((*parts.keys, *parts.values), (*single.keys, *single.values), strict=True):
        assert torch.equal(ours[:2, :4], theirs[:2, :4])
    for ours, theirs in zip(parts.rings, single.rings, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert sorted(ours[0][0].tolist()) == [-1, 13, 14, 15, 16]


@torch.inference_mode()
def test_what_rings_cannot_take_is_refused():
    rings = Rings(0)
    rings.step([(1, 0, 5), (0, 0, 6)])
    for asked in ([(1, 1, 5), (1, 2, 6)], [(0, 1, 5), (2, 0, 6)], [(-1, 0, 5)]):
        with pytest.raises(ValueError, match="a number of rows is outside of what it counts, or has no room"):
            rings.step(asked)
    roomy = Rings(9)
    for asked in ([(1, 1, 5), (0, 1, 5), (1, 2, 6)], [(1, 1, 5), (1, 3, 6)], [(0, i, 1) for i in range(11)]):
        with pytest.raises(ValueError, match="a number of rows is outside of what it counts, or has no room"):
            roomy.step(asked)
    with pytest.raises(ValueError, match="pools of several shapes"):
        Memory(rings.made, rings.keys, rings.values, [(slots[:, 1:], docs) for slots, docs in rings.rings])


def test_changed_weights_are_packed_anew_however_they_were_changed():
    one = model()
    first = packed(one)
    assert packed(one) is first
    with torch.no_grad():
        one.get_parameter("norm.weight").mul_(1.5)
    second = packed(one)
    assert second is not first
    one.get_parameter("blocks.1.layers.channel.mixer.down.weight").data[3, 5] += 1e-3  # no version counter sees this
    third = packed(one)
    assert third is not second
    a, b = (Pages(made, torch.float32).step([(0, 0, 3)]) for made in (third, NativeModel(one)))
    assert torch.equal(a, b)


def test_a_child_process_has_a_team_of_its_own():
    made, before = NativeModel(model()), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        own = Pages(made, torch.float32).step([(0, 0, 3)])
        child = os.fork()
        if child == 0:
            same = torch.equal(Pages(made, torch.float32).step([(0, 0, 3)]), own)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_weights_of_many_chunks_of_memory_stay(monkeypatch):
    one = model()
    own = Pages(NativeModel(one), torch.float32).step([(0, 0, 3)])
    monkeypatch.setattr(packing, "PAGE", 4096)
    monkeypatch.setattr(packing, "CHUNK", 4096)
    made = NativeModel(one)
    assert len(made.arena.chunks) > 9
    noise = [torch.full((1 << 16,), float("nan")) for _ in range(99)]  # takes what was given back
    assert torch.equal(Pages(made, torch.float32).step([(0, 0, 3)]), own)
    assert len(noise) == 99


def test_the_copy_goes_when_the_model_goes():
    one = model()
    packed(one)
    held = len(native._PACKED)
    del one
    assert len(native._PACKED) == held - 1
