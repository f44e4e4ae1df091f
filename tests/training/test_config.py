"""What a configuration accepts, and how it refuses the rest."""

from __future__ import annotations

import pytest
import torch

from rarefy.errors import ConfigError
from rarefy.training.config import LrSchedule, RunConfig
from rarefy.training.plan import CompareConfig, expand
from rarefy.training.reading import assignments, merge, parse_yaml, read_mapping, read_recipe, recipes, validate


def run(**keys: object) -> RunConfig:
    return validate(RunConfig, keys, "run.yaml")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sparsty": 0.9}, "unknown key 'sparsty' in run.yaml (did you mean 'sparsity'?)"),
        ({"lr_schedule": {"nam": "cosine"}}, "unknown key 'lr_schedule.nam' in run.yaml (did you mean 'name'?)"),
        ({"lr": 0.1}, "unknown key 'lr' in run.yaml (did you mean 'optimizer.lr'?)"),
        ({"optimizer": {"momentun": 0.9}}, "torch.optim.SGD has no option 'momentun' (did you mean 'momentum'?)"),
        ({"optimizer": "adamm"}, "there is no optimizer 'adamm' in torch.optim (did you mean 'adam'?)"),
        ({"lr_schedule": "cosin"}, "(did you mean 'cosine'?)"),
        ({"sparsity": 1.0}, "bad value for 'sparsity' in run.yaml: 1.0"),
        ({"epochs": "many"}, "bad value for 'epochs' in run.yaml: 'many'"),
        ({"epochs": 0}, "bad value for 'epochs' in run.yaml: 0"),
        ({"epochs": 1, "steps": 1}, "give epochs or steps, not both"),
        ({"lr_schedule": "step"}, "needs milestones"),
        ({"method": "dense", "sparsity": 0.5}, "method 'dense' takes no sparsity"),
        ({"precision": 16, "device": "cpu"}, "precision 16 needs a GPU"),
        ({"batch_size": -1}, "bad value for 'batch_size'"),
        ({"evaluate": {"ood": "nois"}}, "there is no data set 'nois' (did you mean 'noise'?)"),
        ({"evaluate": {"attacks": ["fgms"]}}, "bad value for 'evaluate.attacks.0'"),
        ({"evaluate": {"epsilon": 0.1}}, "unknown key 'evaluate.epsilon'"),
    ],
)
def test_refusals_name_the_key_and_the_mend(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(**keys)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_fault_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        run(sparsty=0.9, epoch=3)
    assert "'sparsity'" in str(caught.value) and "'epochs'" in str(caught.value)


def test_methods_and_their_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rigl'"):
        run(method="rigel").build_method()
    with pytest.raises(ConfigError, match="did you mean 'every'"):
        run(method="rigl", method_options={"evry": 5}).build_method()
    assert run(method="rigl", sparsity=0.8, method_options={"every": 5}).build_method().options()["every"] == 5


def test_numbers_as_people_write_them() -> None:
    config = run(**parse_yaml("optimizer: {weight_decay: 1e-4, lr: 5e-2}", "run.yaml"))
    assert config.optimizer.options() == {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    adam = run(optimizer={"name": "AdamW", "betas": [0.9, 0.99]})
    assert adam.optimizer.cls() is torch.optim.AdamW
    assert adam.optimizer.options() == {"lr": 1e-3, "betas": [0.9, 0.99]}
    assert run(optimizer={"momentum": 0}).optimizer.options()["nesterov"] is False
    assert parse_yaml("[2:8, 1:16, -1:2.5, 10, 0x10, 1.5]", "run.yaml") == ["2:8", "1:16", "-1:2.5", 10, 16, 1.5]
    asked = assignments(["method_options.pattern=2:8"])
    assert run(method="sr-ste", **asked).build_method().options()["sparsity"] == 0.75


def test_broken_files_are_refused_by_name(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="there is no configuration file"):
        read_mapping(path)
    for text, said in (
        ("a: 1\na: 2", "given twice"),
        ("a: [1", "not valid YAML"),
        ("- 1", "holds a list"),
        ("!!python/object:os.x {}", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_mapping(path)
    path.write_text("")
    assert read_mapping(path) == {}


def test_flags_nest_and_override() -> None:
    over = assignments(["optimizer.lr=1e-3", "method_options.every=7", "include=[fc1.*]"])
    assert over == {"optimizer": {"lr": 0.001}, "method_options": {"every": 7}, "include": ["fc1.*"]}
    merged = merge({"optimizer": {"lr": 0.1, "momentum": 0.5}}, over)
    assert merged["optimizer"] == {"lr": 0.001, "momentum": 0.5}
    for wrong in ("lr", "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="key=value"):
            assignments([wrong])


def test_another_optimizer_begins_anew() -> None:
    recipe = read_recipe("n-m")
    over = assignments(["base.optimizer={name: adamw, lr: 0.002}", "base.optimizer.weight_decay=0.01"])
    found = validate(CompareConfig, merge(recipe, over), "n-m").base["optimizer"]
    assert found == {"name": "adamw", "lr": 0.002, "weight_decay": 0.01}
    same = merge(recipe, assignments(["base.optimizer={name: SGD, lr: 0.002}"]))["base"]["optimizer"]
    assert same == {"name": "SGD", "lr": 0.002, "momentum": 0.9, "weight_decay": 5e-4}


def test_a_dump_is_the_same_configuration_again() -> None:
    config = run(
        method="rigl", sparsity=0.9, optimizer={"name": "adam"}, lr_schedule={"name": "step", "milestones": [0.5]}
    )
    again = validate(RunConfig, config.dump(), "config.yaml")
    assert again == config and again.identity() == config.identity()
    assert run(name="x", threads=2).identity() == run().identity()
    assert run(seed=1).identity() != run().identity()


def test_learning_rates() -> None:
    cosine = LrSchedule(warmup_steps=4)
    assert [cosine.factor(s, 104) for s in (0, 3, 4, 54, 104)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    step = LrSchedule(name="step", milestones=[0.5, 75], gamma=0.1)
    assert [step.factor(s, 100) for s in (49, 50, 75)] == pytest.approx([1.0, 0.1, 0.01])
    assert LrSchedule(name="constant").factor(7, 10) == 1.0


def compared(**keys: object) -> CompareConfig:
    return validate(CompareConfig, {"methods": ["dense", "static", "rigl"], **keys}, "compare.yaml")


def test_a_comparison_runs_dense_once_a_seed() -> None:
    runs = expand(compared(sparsities=[0.9, 0.98], seeds=2), "x")
    names = [r.name for r in runs]
    assert names[:5] == ["dense-s0", "static-0.9-s0", "static-0.98-s0", "rigl-0.9-s0", "rigl-0.98-s0"]
    assert len(names) == 10 and len(set(names)) == 10


def test_patterns_take_the_place_of_sparsities() -> None:
    entries = ["dense", "small-dense", "sr-ste", {"method": "t-mask", "patterns": ["1:4t"]}, "static"]
    config = compared(methods=entries, patterns=["2:4", "1:4", "channel"], sparsities=[0.3], seeds=[7])
    runs = {r.name: r.config for r in expand(config, "x")}
    assert [*runs] == [
        "dense-s7", "small-dense-0.5-s7", "small-dense-0.75-s7", "small-dense-0.3-s7", "sr-ste-2of4-s7", "sr-ste-1of4-s7",
        "sr-ste-channel-s7", "t-mask-1of4t-s7", "static-2of4-s7", "static-1of4-s7", "static-channel-s7",
    ]  # fmt: skip
    one = runs["sr-ste-1of4-s7"]
    assert (one.label, one.sparsity, one.method_options["pattern"]) == ("sr-ste 1:4", 0.75, "1:4")
    assert runs["static-channel-s7"].sparsity == 0.3 and runs["t-mask-1of4t-s7"].label == "t-mask 1:4t"
    assert runs["dense-s7"].method_options == {} and runs["small-dense-0.5-s7"].label is None


def test_shared_options_go_where_they_fit() -> None:
    config = compared(
        base={"epochs": 2, "method_options": {"every": 5, "allocation": "er"}},
        overrides={"rigl": {"method_options": {"every": 9}, "optimizer": {"lr": 0.3}}},
        seeds=[4],
    )
    dense, static, rigl = (r.config for r in expand(config, "x"))
    assert dense.method_options == {} and static.method_options == {"allocation": "er"}
    assert rigl.method_options == {"every": 9, "allocation": "er"} and rigl.optimizer.lr == 0.3
    assert {c.epochs for c in (dense, static, rigl)} == {2} and {c.seed for c in (dense, static, rigl)} == {4}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"methods": ["rigel"]}, "did you mean 'rigl'"),
        ({"methods": ["rigl", "rigl"]}, "give each its own label"),
        ({"methods": []}, "methods"),
        ({"overrides": {"rig": {}}}, "did you mean 'rigl'"),
        ({"base": {"seed": 3}}, "may not hold seed"),
        ({"base": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"base": {"method_options": {"evry": 3}}}, "did you mean 'every'"),
        ({"sparsites": [0.5]}, "did you mean 'sparsities'"),
        ({"seeds": []}, "seeds"),
        ({"sparsities": [90]}, "sparsities"),
        ({"patterns": ["5:4"]}, "5:4"),
        ({"methods": ["sr-ste"], "patterns": ["2:4t", "4x"]}, "unknown pattern"),
        ({"methods": ["asp"], "patterns": ["channel"]}, "asp takes patterns of the kind NM"),
    ],
)
def test_comparisons_are_refused_before_anything_runs(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        expand(compared(**keys), "x", "compare.yaml")


def test_every_recipe_is_valid() -> None:
    assert {"demo", "mnist-lenet", "cifar10-resnet20"} <= set(recipes())
    for name in recipes():
        runs = expand(validate(CompareConfig, read_recipe(name), name), "x", name)
        assert runs
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        read_recipe("dem")
    demo = expand(validate(CompareConfig, read_recipe("demo"), "demo"), "x")
    assert len(demo) == 45
