"""The prefix index against a plain set of blocks per instance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from llumsched.core.scheduling.prefix_index import PrefixIndex

IDS = ("a", "b", "c", "d")


def make_index(max_blocks: int = 1000, *instance_ids: str) -> PrefixIndex:
    index = PrefixIndex(max_blocks)
    for instance_id in instance_ids or IDS:
        index.add_instance(instance_id)
    return index


def chain(prompt: str) -> tuple[int, ...]:
    """Block hashes of a prompt: each covers what is before it."""
    return tuple(hash(prompt[:end]) for end in range(1, len(prompt) + 1))


def matched(
    index: PrefixIndex, hashes: tuple[int, ...], ids: tuple[str, ...] = IDS
) -> dict[str, int]:
    """Leading blocks by holder; longest come first, and each holder once."""
    found = index.match(hashes, ids)
    assert sorted((num_blocks for num_blocks, _ in found), reverse=True) == [n for n, _ in found]
    holders = [(ids[row], num_blocks) for num_blocks, rows in found for row in rows.tolist()]
    assert len(dict(holders)) == len(holders)
    return dict(holders)


prompts = st.text("xy", min_size=1, max_size=12)


@given(cached=st.dictionaries(st.sampled_from(IDS), st.lists(prompts, max_size=4)), prompt=prompts)
def test_a_match_is_the_longest_common_start(cached: dict[str, list[str]], prompt: str) -> None:
    index = make_index()
    for instance_id, texts in cached.items():
        for text in texts:
            index.store(instance_id, chain(text))
    expected = {
        instance_id: max(
            end for text in texts for end in range(len(prompt) + 1) if text.startswith(prompt[:end])
        )
        for instance_id, texts in cached.items()
        if any(text.startswith(prompt[0]) for text in texts)
    }
    assert matched(index, chain(prompt)) == expected


def test_an_eviction_shortens_the_match() -> None:
    index = make_index()
    index.store("a", chain("xyxy"))
    index.store("b", chain("xyxy"))
    index.remove("a", chain("xyxy")[2:])
    assert matched(index, chain("xyxy")) == {"a": 2, "b": 4}
    index.clear("b")
    assert matched(index, chain("xyxy")) == {"a": 2}


def test_a_full_index_keeps_the_start_of_a_prompt() -> None:
    index = make_index(3)
    index.store("a", chain("xyxyxy"))
    assert (len(index), index.num_dropped) == (3, 3)
    assert matched(index, chain("xyxyxy")) == {"a": 3}
    index.store("b", chain("xy"))
    assert matched(index, chain("xyxyxy")) == {"a": 3, "b": 2}


def test_unknown_instances_are_ignored_and_slots_are_used_again() -> None:
    index = make_index()
    index.store("zz", chain("x"))
    index.remove("zz", chain("x"))
    index.clear("zz")
    assert len(index) == 0
    index.store("b", chain("xy"))
    index.remove_instance("b")
    index.add_instance("e")
    assert matched(index, chain("xy"), ("a", "c", "d", "e")) == {}


class IndexMachine(RuleBasedStateMachine):
    """Any order of events leaves exactly the blocks that were stored and not removed."""

    def __init__(self) -> None:
        super().__init__()
        self.index = make_index()
        self.truth: dict[str, set[int]] = {instance_id: set() for instance_id in IDS}

    @rule(instance_id=st.sampled_from(IDS), prompt=prompts)
    def store(self, instance_id: str, prompt: str) -> None:
        self.index.store(instance_id, chain(prompt))
        self.truth[instance_id].update(chain(prompt))

    @rule(instance_id=st.sampled_from(IDS), prompt=prompts)
    def remove(self, instance_id: str, prompt: str) -> None:
        self.index.remove(instance_id, chain(prompt))
        self.truth[instance_id].difference_update(chain(prompt))

    @rule(instance_id=st.sampled_from(IDS))
    def clear(self, instance_id: str) -> None:
        self.index.clear(instance_id)
        self.truth[instance_id].clear()

    @rule()
    def go_on_from_a_checkpoint(self) -> None:
        state = self.index.state()
        self.index = make_index()
        self.index.restore(state)

    @invariant()
    def it_holds_the_truth(self) -> None:
        for instance_id, blocks in self.truth.items():
            assert self.index.blocks_of(instance_id) == blocks
        assert len(self.index) == len(set().union(*self.truth.values()))


def test_any_order_of_events() -> None:
    run_state_machine_as_test(IndexMachine)
