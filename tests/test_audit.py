"""The one-run audit: correct private steps stay below their claim, and every planted fault is refuted."""

import dataclasses
import sys
import time

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from scipy import stats

from clients.private import NoisyOptimizer, PrivateStep
from clients.task import simulated_key
from fedlora import seeds
from fedlora.check import ConfigError
from fedlora.tools import audit as privacy_audit
from fedlora.tools.audit import Settings, audit, lower_bound, main, p_value, parse

ALONE = Settings(clients=300, canaries=300, sample_rate=0.1, steps=8)  # a canary a client: four batches of five are empty


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- faults to plant


def no_clipping(patch) -> None:
    real = DPOptimizer.clip_and_accumulate

    def unbounded(self) -> None:
        bound, self.max_grad_norm = self.max_grad_norm, 1e12
        real(self)
        self.max_grad_norm = bound

    patch.setattr(DPOptimizer, "clip_and_accumulate", unbounded)


def noise_divided_by_the_batch(patch) -> None:
    real = NoisyOptimizer.add_noise

    def faint(self) -> None:
        sigma, self.noise_multiplier = self.noise_multiplier, self.noise_multiplier / self.expected_batch_size
        real(self)
        self.noise_multiplier = sigma

    patch.setattr(NoisyOptimizer, "add_noise", faint)


def clipping_of_the_mean(patch) -> None:
    """As plain training does it: the mean of a batch is clipped, and not each record."""

    def of_the_mean(self) -> None:
        for p in self.params:
            total = p.grad_sample.sum(0)
            total *= min(1.0, len(p.grad_sample) * self.max_grad_norm / (float(total.norm()) + 1e-6))
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
            p.grad_sample._processed = True

    patch.setattr(DPOptimizer, "clip_and_accumulate", of_the_mean)


def same_noise_in_every_step(patch) -> None:
    real = NoisyOptimizer.add_noise

    def again(self) -> None:
        self.noise = seeds.Stream(bytes(32))
        real(self)

    patch.setattr(NoisyOptimizer, "add_noise", again)


def same_noise_in_every_round(patch) -> None:
    patch.setattr(privacy_audit, "simulated_key", lambda streams, *rest: simulated_key((*streams[:2], 0), *rest))


def same_noise_for_every_client(patch) -> None:
    patch.setattr(privacy_audit, "simulated_key", lambda streams, *rest: simulated_key((streams[0], 0, streams[2]), *rest))


def skipped_empty_batches(patch) -> None:
    real = PrivateStep.__call__
    patch.setattr(PrivateStep, "__call__", lambda self, batch, lr: real(self, batch, lr) if len(batch) else torch.zeros(0))


FAULTS = {
    no_clipping: Settings(),
    noise_divided_by_the_batch: Settings(),
    clipping_of_the_mean: Settings(),
    same_noise_in_every_step: Settings(rounds=1),
    same_noise_in_every_round: Settings(rounds=4),
    same_noise_for_every_client: Settings(),
    skipped_empty_batches: ALONE,
}


# ---- the audit


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_refuted(fault, monkeypatch) -> None:
    fault(monkeypatch)
    finding = audit(FAULTS[fault])
    assert finding.refuted and finding.bound > 2 * finding.claimed


@pytest.mark.parametrize("fault", [no_clipping, noise_divided_by_the_batch, same_noise_in_every_round])
@pytest.mark.parametrize("change", [{"sample_rate": 0.5}, {"physical": 40}, {"clients": 1}], ids=str)
def test_faults_show_in_other_settings_too(fault, change, monkeypatch) -> None:
    fault(monkeypatch)
    assert audit(Settings(**change)).refuted


@pytest.mark.parametrize("seed", range(5))
def test_correct_code_stays_well_below_its_claim(seed) -> None:
    """1,000 canaries, σ 4, q 1, T 4: ε = 2.00, and a correct mechanism shows at most 1.2 of it."""
    started = time.process_time()
    finding = audit(Settings(seed=seed))
    assert finding.claimed == pytest.approx(2.00, abs=0.01)
    assert finding.bound <= 1.2
    assert time.process_time() - started < 2.0  # about 0.3 s, and PRV's first import


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 0.3, "steps": 12},
        {"steps": 1, "rounds": 1, "noise_multiplier": 1.0},
        {"physical": 17, "clip": 0.01},
        {"clients": 1, "noise_multiplier": 1.0},
        {"clients": 300, "canaries": 300, "sample_rate": 0.1, "steps": 8},
        {"noise_multiplier": 0.0},  # claims nothing, and nothing is refuted
    ],
    ids=str,
)
def test_correct_code_stays_below_in_other_settings(change) -> None:
    assert not audit(Settings(**change)).refuted


def test_the_audit_has_power_and_is_not_always_silent() -> None:
    """Correct code with a large ε must show much of it: a bound that is always 0 would refute nothing."""
    finding = audit(Settings(noise_multiplier=1.0, clients=1))  # ε = 10
    assert 1.5 < finding.bound < finding.claimed


# ---- the statistics


def test_for_pure_privacy_the_p_value_is_binomial() -> None:
    assert p_value(100, 50, 40, 1.0, 0.0) == pytest.approx(stats.binom.sf(39, 50, np.e / (1 + np.e)))
    assert p_value(100, 50, 40, 1.0, 1e-5) > p_value(100, 50, 40, 1.0, 0.0)
    assert p_value(100, 50, 0, 1.0, 1e-5) == 1.0


def test_the_bound_of_perfect_guesses_is_known_in_closed_form() -> None:
    """All r guesses right: (e^ε / (1 + e^ε))^r = alpha."""
    for guesses in (10, 433, 1000):
        rate = 0.05 ** (1 / guesses)
        assert lower_bound(1000, guesses, guesses, 0.0, 0.05) == pytest.approx(np.log(rate / (1 - rate)), abs=2e-3)
    assert lower_bound(1000, 100, 50, 1e-5, 0.05) == 0.0  # as many as by chance


def test_the_bound_covers_randomised_response() -> None:
    """ε-DP randomised response, the tightest mechanism: at most alpha of the bounds are above its ε."""
    true, rng = 1.0, np.random.default_rng(0)
    right = rng.binomial(200, np.e / (1 + np.e), 2000)
    bounds = {int(v): lower_bound(200, 200, int(v), 0.0, 0.05) for v in set(right)}
    above = np.mean([bounds[int(v)] > true for v in right])
    assert 0.02 < above <= 0.065


# ---- the command line


def test_the_command_line_prints_both_numbers_and_a_verdict(capsys, monkeypatch) -> None:
    assert main(["canaries=200", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert "ε = 2.00 at δ = 1e-05" in shown and "ε ≥" in shown and "the claim stands" in shown
    no_clipping(monkeypatch)
    assert main([]) == 1
    assert "REFUTED" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["audit", "steps=0"])
    assert main() == 2
    assert capsys.readouterr().err == "error: steps=0 is out of range; it must be above 0\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_usage_every_setting_and_the_exit_statuses(capsys, flag) -> None:
    assert main([flag]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m fedlora.tools.audit [setting=value …]\n") and "exit status: 0 " in shown
    for item in dataclasses.fields(Settings):
        assert f"  {item.name} ({item.default:g}) " in shown and item.metadata["help"] in shown


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("canaries", "canaries is not a setting; write setting=value, such as canaries=1000"),
        ("canary=5", "canary is not a setting; did you mean canaries?"),
        ("steps=four", "steps=four is not a whole number; write steps=4, for example"),
        ("delta=tiny", "delta=tiny is not a number; write delta=1e-05, for example"),
        ("delta=1", "delta=1.0 is out of range; it must be at least 0 and below 1"),
        ("sample_rate=nan", "sample_rate=nan is out of range; it must lie above 0 and be at most 1"),
        ("steps=5", "steps=5 cannot be spread over rounds=2; make it a multiple"),
        ("clients=2000", "clients=2000 is above canaries=1000; every client needs one"),
        ("clip=inf", "clip=inf is out of range; it must be finite"),
        ("canaries=1000000", "canaries=1000000 is out of range; it must lie between 1 and 10000"),
        ("steps=1000000", "steps=1000000 is out of range; it must lie between 1 and 10000"),
    ],
)
def test_bad_arguments_get_one_sentence(argument, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        parse([argument])
    assert str(error.value) == sentence
