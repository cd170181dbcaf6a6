"""Sites of AstroM3's photometry encoder: z in spite of its reshape, and rows that say something."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from training.astrom3.model.informer import InformerArguments, PhotometryClassifier
from training.astrom3.model.network import AstroM3Arguments, AstroM3Classifier, Stars
from training.astrom3.model.preprocess import WAVELENGTHS
from training.interpretability.sites.open_site import open_site, site_names

STARS, LENGTH, OBSERVED, WIDTH, HEADS = 3, 40, 25, 16, 4
SMALL = {"d_model": WIDTH, "n_heads": HEADS, "d_ff": 32, "e_layers": 3}


def made(kind: str) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Return a small classifier with random weights, and its inputs."""
    torch.manual_seed(1)
    mask = torch.zeros(STARS, LENGTH)
    mask[:, :OBSERVED] = 1
    inputs = {"photometry": 3 * torch.randn(STARS, LENGTH, 9), "mask": mask}
    if kind == "photometry":
        return PhotometryClassifier(InformerArguments(seq_len=LENGTH, **SMALL)).eval(), inputs
    arguments = AstroM3Arguments(
        classification=True, seq_len=LENGTH, hidden_dim=32, **{f"p_{name}": value for name, value in SMALL.items()}
    )
    inputs |= {"spectra": torch.randn(STARS, 3, len(WAVELENGTHS)), "metadata": torch.randn(STARS, 34)}
    return AstroM3Classifier(arguments).eval(), inputs


def logits_of(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = network(Stars(**inputs)) if isinstance(network, AstroM3Classifier) else network(**inputs)
    return logits


@pytest.mark.parametrize("kind", ["photometry", "all modalities"])
@torch.no_grad()
def test_the_site_is_the_network(kind: str) -> None:
    network, inputs = made(kind)
    logits = logits_of(network, inputs)
    assert site_names(network) == ["attn_layers.0", "attn_layers.1", "attn_layers.2"]
    for name in site_names(network):
        site = open_site(network, name)
        attention = site.attend(inputs)
        by_head = attention.z.unflatten(2, (HEADS, WIDTH // HEADS))
        for pattern, same in ((attention.pattern, True), (attention.pattern.flip(3), False)):
            z = torch.einsum("nhqp,nhpd->nqhd", pattern, attention.values)
            assert torch.allclose(z, by_head, atol=1e-5) == same
        assert torch.allclose(site.splice(inputs, attention.z)[0], logits, atol=1e-5)
        hook = site.output.register_forward_pre_hook(lambda _, arguments: (5 * arguments[0],))
        changed = logits_of(network, inputs)
        hook.remove()
        assert not torch.allclose(changed, logits, atol=1e-3)
        assert torch.allclose(site.splice(inputs, 5 * attention.z)[0], changed, atol=1e-5)


@torch.no_grad()
def test_z_has_one_head_after_the_other_though_the_projection_does_not() -> None:
    network, inputs = made("photometry")
    site, seen = open_site(network, "attn_layers.1"), []
    hook = site.output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network(**inputs)
    hook.remove()
    context = site.attend(inputs).z.unflatten(2, (HEADS, -1)).transpose(1, 2)  # [N, H, L, d_head]
    assert torch.allclose(seen[0], context.reshape(STARS, LENGTH, WIDTH), atol=1e-5)
    assert not torch.allclose(seen[0], context.transpose(1, 2).reshape(STARS, LENGTH, WIDTH), atol=1e-2)


@torch.no_grad()
def test_rows_are_the_attending_observations_and_one_that_does_not_attend() -> None:
    network, inputs = made("photometry")
    attention = open_site(network, "attn_layers.0").attend(inputs)
    uniform = (attention.pattern == 1 / LENGTH).all(3).all(1)
    assert (uniform & attention.queries).sum(1).tolist() == [1] * STARS
    attending = ~uniform & (inputs["mask"] > 0)
    assert torch.equal(attending & attention.queries, attending)
    assert not attention.queries[:, OBSERVED:].any()
    assert (attention.pattern.amax(3) > 1.01 / LENGTH).sum(2).eq(4).all()  # ceil(ln 40) queries in every head
    same = attention.z[0][uniform[0]]
    assert torch.allclose(same, same[:1].expand_as(same))
