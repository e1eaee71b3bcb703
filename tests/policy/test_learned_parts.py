"""Policies with learned parts: two files that belong together, and what is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from kills import kills
from safetensors.torch import load_file, save_file

from deos_fx.policy.learned import Learned
from deos_fx.policy.policy import Policy
from deos_fx.policy.reduction import Reduction


def policy(scale: float = 1.0) -> Policy:
    learned = Learned({"probe": scale * torch.arange(6.0), "metric": torch.eye(6)[:, :2]})
    similarity = {"feature": 0.5, "learned": 0.5}
    one = Reduction("projector", 8, learned=learned, similarity=similarity, gain=1.0)
    return Policy((one, Reduction("decoder.1", 4)), name="learned")


def test_a_policy_with_learned_parts_is_two_files(tmp_path: Path) -> None:
    policy().save(tmp_path / "policy.json")
    assert {path.name for path in tmp_path.iterdir()} == {"policy.json", "policy.safetensors"}
    assert Policy.load(tmp_path / "policy.json") == policy()
    assert Policy.load(tmp_path / "policy.json") != policy(2.0)
    data = json.loads((tmp_path / "policy.json").read_text())
    assert data["reductions"][0]["learned"] == {
        "probe": {"shape": [6], "dtype": "float32"},
        "metric": {"shape": [6, 2], "dtype": "float32"},
    }
    assert len(data["learned"]) == 64


def test_a_policy_without_them_is_a_single_file(tmp_path: Path) -> None:
    Policy((Reduction("decoder.1", 4),)).save(tmp_path / "policy.json")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    assert "learned" not in (tmp_path / "policy.json").read_text()


def test_missing_damaged_and_other_parts_are_refused(tmp_path: Path) -> None:
    path, tensors = tmp_path / "policy.json", tmp_path / "policy.safetensors"
    policy().save(path)
    values = load_file(tensors)
    save_file({**values, "projector/probe": values["projector/probe"] + 1}, tensors)
    with pytest.raises(ValueError, match="policy.json .* hash differs"):
        Policy.load(path)
    save_file({"projector/probe": values["projector/probe"]}, tensors)
    with pytest.raises(ValueError, match="policy.json .* are not those of the policy"):
        Policy.load(path)
    tensors.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="policy.safetensors is damaged"):
        Policy.load(path)
    tensors.unlink()
    with pytest.raises(ValueError, match="read a policy with Policy.load"):
        Policy.load(path)


def test_a_kill_leaves_a_policy_or_parts_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    old, new, seen = policy(), policy(2.0), set()
    old.save(path)
    for _ in kills(lambda: new.save(path)):
        try:
            found = Policy.load(path)
            seen.add("old" if found == old else "new" if found == new else "a mixture")
        except ValueError as error:
            assert "learned parts" in str(error)
            seen.add("refused")
        old.save(path)
        assert len(list(tmp_path.iterdir())) == 2
    assert seen == {"old", "refused", "new"}


def test_a_policy_keeps_its_own_copy() -> None:
    probe = torch.zeros(3)
    reduction = Reduction("projector", 8, learned=Learned({"probe": probe}))
    probe += 1
    assert torch.equal(reduction.learned["probe"], torch.zeros(3))


def test_words_say_what_it_looks_at() -> None:
    words = str(policy().reductions[0])
    assert "learned probe of a direction of the tokens" in words
    assert "0.5 feature + 0.5 learned" in words
    text = Reduction("projector", 8, learned=Learned({"text": torch.zeros(6, 2)}))
    assert "top_k by learned text of the words of the prompt (rank 2)" in str(text)
    assert not text.scores


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"learned": {"charm": torch.zeros(3)}}, "no part 'charm'; choose from probe"),
        ({"learned": {"probe": torch.zeros(3, 2)}}, "give a tensor with 1 axis"),
        ({"learned": {"probe": torch.tensor([1.0, torch.nan])}}, "not finite"),
        ({"similarity": {"learned": 1.0}}, "learned part 'metric' need each"),
        (
            {"learned": {"metric": torch.eye(3)}},
            "learned part 'metric' need each",
        ),
        ({"learned": {"probe": torch.zeros(3)}, "selector": "grid"}, "probe has no effect"),
        ({"sharpness": 2.0}, "sharpness 2.0 has no effect with the weighting 'one'"),
    ],
)
def test_what_has_no_effect_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Reduction("projector", 8, **fields)  # type: ignore[arg-type]


def test_a_part_is_a_tensor() -> None:
    with pytest.raises(TypeError, match="probe is a list; give a tensor"):
        Learned({"probe": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="probe is a torch.complex64; give a tensor of real"):
        Learned({"probe": torch.ones(3, dtype=torch.complex64)})


def test_a_full_disk_leaves_the_policy_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy().save(tmp_path / "policy.json")

    def full(part: Path, text: str, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"cannot write the file .*policy\.json: No space left"):
        policy(2.0).save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy()


def test_tensors_of_others_are_not_replaced(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.ones(2)}, weights)
    with pytest.raises(
        FileExistsError, match=r"model\.safetensors: it holds other tensors .lm_head"
    ):
        policy().save(tmp_path / "model.json")
    assert [*load_file(weights)] == ["lm_head.weight"]
    # A policy without learned parts is one file.
    Policy().save(tmp_path / "model.json")
    # Nobody can read these.
    weights.write_bytes(b"damaged")
    policy().save(tmp_path / "model.json")
    with pytest.raises(ValueError, match=r"model\.safetensors would be the file of the policy's"):
        policy().save(weights)
    assert Policy.load(tmp_path / "model.json") == policy()
