"""The toy transformer has an induction head, and its site is one."""

from __future__ import annotations

import torch
from torch import Generator

from training.interpretability.known_answers.toy_transformer import (
    LENGTH,
    PERIODS,
    START,
    ToySite,
    ToyTransformer,
    draw_sequences,
)


def test_the_next_token_is_the_one_after_the_previous_occurrence() -> None:
    sequences = draw_sequences(50, Generator().manual_seed(1))
    for tokens, period, known, following, after in zip(
        sequences.tokens.tolist(),
        sequences.period.tolist(),
        sequences.predictable.tolist(),
        sequences.next.tolist(),
        sequences.after_previous().tolist(),
        strict=True,
    ):
        assert PERIODS[0] <= period <= PERIODS[1]
        assert tokens[0] == START
        assert tokens[1 : 1 + period] == tokens[1 + period : 1 + 2 * period]
        assert following[:-1] == tokens[1:]
        for query in range(LENGTH):
            previous = [place for place in range(query) if tokens[place] == tokens[query]]
            assert known[query] == bool(previous)
            assert [source for source in range(LENGTH) if after[query][source]] == [1 + place for place in previous]
            assert all(tokens[1 + place] == following[query] for place in previous)


def test_the_site_is_the_network() -> None:
    torch.manual_seed(2)
    network, tokens = ToyTransformer(), draw_sequences(4, Generator().manual_seed(3)).tokens
    with torch.no_grad():
        logits = network(tokens)
        for number in range(2):
            site = ToySite(network, number)
            attention = site.attend({"tokens": tokens})
            made = torch.einsum("nhqp,nhpd->nqhd", attention.pattern, attention.values).flatten(2)
            assert torch.allclose(attention.z, made, atol=1e-5)
            assert torch.allclose(site.splice({"tokens": tokens}, attention.z)[0], logits, atol=1e-6)
            assert not torch.allclose(site.splice({"tokens": tokens}, 2 * attention.z)[0], logits, atol=1e-3)
            assert (attention.pattern.triu(1) == 0).all()
