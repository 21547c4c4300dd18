"""Tables of positions, of which an input reads as many as it has tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import demp_fx


class Joint(nn.Module):
    """Tokens of a text, without positions, before those of an image; the text is read no more."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(6, 8), nn.Linear(6, 8)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("places", torch.randn(20, 8))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        count = text.shape[1]
        x = torch.cat([self.text(text), self.image(image)], 1)
        places = self.places[: image.shape[1]]
        x = x + torch.cat([torch.zeros((count, 8), dtype=x.dtype), places])[None]
        x = self.mix(torch.cat([x[:, :count].sin(), x[:, count:]], 1))
        result: Tensor = self.out(x[:, count:])
        return result


def test_tokens_that_nobody_reads_are_as_many_as_the_input_has() -> None:
    torch.manual_seed(0)
    model = Joint().double()
    with torch.no_grad():
        model.mix.weight[:4] = 0
        model.mix.bias[:4] = 0
    inputs = (torch.randn(2, 5, 6).double(), torch.randn(2, 9, 6).double())
    narrow = demp_fx.compile(model, inputs, cuts="always").module
    assert narrow.get_parameter("out.weight").shape == (4, 4)
    others = (torch.randn(3, 7, 6).double(), torch.randn(3, 12, 6).double())
    torch.testing.assert_close(narrow(*others), model(*others), rtol=1e-12, atol=1e-12)
