"""How hypothesis draws networks."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.block import BLOCKS, Block, Draw, Spec
from tests.fuzz.kill import KILLS
from tests.fuzz.network import HEADS, Net

DEPTH = 2


def _spec(block: type[Block], world: str, depth: int) -> Draw:
    options = dict(block.draws)
    for name, inside in block.nests.items():
        inner = world if inside == "same" else inside
        options[name] = st.lists(specs(inner, depth - 1), min_size=1, max_size=2).map(tuple)
    return st.fixed_dictionaries(options).map(lambda o: Spec(block.__name__, tuple(o.items())))


def specs(world: str, depth: int = DEPTH) -> Draw:
    """Blocks that stand in a world, nested at most `depth` deep."""
    fitting = [b for b in BLOCKS.values() if world in b.worlds and (depth or not b.nests)]
    return st.deferred(lambda: st.one_of([_spec(b, world, depth) for b in fitting]))


def _nets(space: tuple[int, ...]) -> Draw:
    world = "maps" if space else "tokens"
    return st.builds(
        Net,
        blocks=st.lists(specs(world), min_size=1, max_size=3).map(tuple),
        space=st.just(space),
        stem=st.integers(2, 8),
        head=st.sampled_from(HEADS),
        kills=st.lists(st.sampled_from(list(KILLS)), min_size=1, max_size=3, unique=True).map(
            tuple
        ),
        fraction=st.sampled_from([0.5, 0.3, 0.8, 1.0]),
        aligned=st.booleans(),
        cuts=st.sampled_from(["pays", "always", "never"]),
        observed=st.booleans(),
        seed=st.integers(0, 2**16),
    )


nets = st.sampled_from([(5, 4), (6, 6), (), (6,), (7,), (3, 4, 3)]).flatmap(_nets)
