"""Networks that were once narrowed wrongly or refused, each in its smallest form."""

from __future__ import annotations

import pytest

from tests.fuzz.check import check
from tests.fuzz.network import Net

FOUND = {
    "tokens of the code's own, as many as samples, where nearly all channels are dead": """
        Net(blocks=(Gate(how='glu'),
                    Attention(heads=1, size=1, groups=1, kind='cross', product='sdpa', bias=False,
                              extra='none')),
            space=(), stem=2, kills=('zero', 'rows'))""",
    "a number of the code's, which is as exact as what it is padded on": """
        Net(blocks=(Reorder(how='padded'),), stem=2)""",
    "a single channel that is picked by a number": """
        Net(blocks=(Split(how='index', first=1, work='layer'),), space=(5, 4), stem=2,
            kills=('zero',), fraction=0.5, cuts='always')""",
    "a narrow() whose length the code computes": """
        Net(blocks=(Split(how='narrow', work='gate', swap=True, first=3),
                    Grouped(each=2, bias=True, norm='instance', act='silu', groups=2)),
            stem=3, head='flat', kills=('last', 'columns'), fraction=0.3, aligned=True)""",
    "two readers of a value, each narrowed by a gather and picking its part": """
        Net(blocks=(Gate(how='simple'),), space=(7,), stem=7, head='tied',
            kills=('zero', 'constant'), fraction=0.8, cuts='always', seed=826)""",
    "a select() behind a gather": """
        Net(blocks=(Split(work='relu', swap=True, how='select'),), space=(3, 4, 3), stem=2,
            kills=('silent', 'last', 'zero'), fraction=0.3, cuts='always', observed=True,
            seed=1682)""",
    "masks are watched on calibration data": """
        Net(blocks=(Pointwise(name='masked'),), observed=True)""",
    "a subclass of a batch norm that calls its base's forward": """
        Net(blocks=(Norm(kind='batch'),), space=(), stem=2)""",
    "two axes merged into one, joined with other channels": """
        Net(blocks=(Dense(inner=(Mlp(), Einsum(width=6, how='outer'))),), space=(), stem=3,
            kills=('rows', 'columns'), cuts='always', seed=1)""",
    "a movement that takes nothing but constants": """
        Net(blocks=(Split(work='double', how='view'), Split(work='double', how='view')), stem=6,
            kills=('bias', 'zero'), fraction=0.8, cuts='always', seed=2)""",
    "expand_as behind a cut": """
        Net(blocks=(Position(how='cat'), Position(how='cat'), Split(work='double', how='view')),
            stem=6, head='tied', kills=('bias', 'silent', 'zero'), fraction=0.8, cuts='always',
            seed=14069)""",
    "a node that cannot be kept alone": """
        Net(blocks=(Transposed(width=2, groups=2, act='none'), Reorder(how='pooled'),
                    SqueezeExcite()), space=(6, 6), stem=5, kills=('silent',), fraction=1.0,
            aligned=True, cuts='always', observed=True, seed=110)""",
    "products with computed weights": """
        Net(blocks=(Standardised(gain=False, bias=False, width=5), Conv()), stem=2,
            kills=('silent', 'zero', 'rows'), fraction=0.8, aligned=True, observed=True,
            seed=62)""",
    "a movement behind a movement that was replaced": """
        Net(blocks=(Shuffle(how='blocks'),
                    Branches(left=(Shuffle(how='blocks'),), how='add', width=5)), space=(3, 4, 3),
            head='tuple', kills=('rows',), aligned=True, cuts='never', observed=True, seed=1)""",
    "a resolution taken from a part of a shape": """
        Net(blocks=(Tokens(inner=(Attention(heads=1, size=1, groups=2, bias=False, kind='cross',
                    product='scaled_before', extra='qk_l2'),)),), space=(3, 4, 3), stem=2,
            kills=('columns', 'zero'), cuts='never', observed=True, seed=1601)""",
    "a resolution behind a shuffle": """
        Net(blocks=(Branches(right=(Standardised(width=2, gain=False),), width=4,
                    left=(Residual(how='max', inner=(Shuffle(groups=3),)),)),
                    Shuffle(how='stack')), stem=3, head='dict', kills=('columns',), fraction=1.0,
            seed=124)""",
    "constants put back in front of a norm that counts the zeros": """
        Net(blocks=(Norm(kind='group_one'), Tokens(inner=(
                Branches(left=(Gate(how='geglu'),), right=(LayerScale(), Buffer(how='mask')),
                         width=6), Mlp(norm='group', hidden=7, act='silu')))), space=(3, 4, 3),
            stem=8, head='dict', kills=('rows', 'bias', 'columns'), fraction=0.3, cuts='always',
            seed=303)""",
    "constants that meet a buffer in a product": """
        Net(blocks=(Tokens(inner=(Buffer(how='matrix'),)),), space=(6, 6), stem=6,
            kills=('columns', 'rows', 'bias'), fraction=0.8, cuts='always', seed=3219)""",
    "constants in windows that are padded at other sizes": """
        Net(blocks=(Pool(how='max'), Windows(shift=False, inner=(Attention(heads=1, size=1,
                groups=1, kind='fused', product='sdpa', bias=False, extra='none'),))),
            space=(5, 4), stem=2, head='mean', kills=('bias',), seed=113)""",
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_networks_that_once_failed(text: str) -> None:
    check(Net.read(text))
