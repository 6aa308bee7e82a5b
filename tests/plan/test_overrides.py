from __future__ import annotations

import pytest
from example_plan import CLASSES, PLAN, REGIONS

from sagittal.errors import PlanError
from sagittal.plan import Plan
from sagittal.plan.base import EVERY_FIELD
from sagittal.plan.optimizers import SGD
from sagittal.plan.overrides import (
    deep_supervision_weights,
    override,
    override_network,
    parse_settings,
    require_known_fields,
)


def test_settings_are_parsed_as_json_lists_or_text():
    texts = ["patch.size=96,96,96", "training.seed = 3", "a=1e-3", "b=true", "c=[1, 2]", "d=bf16", "e=x=y", "f=0.5,2"]
    assert parse_settings(texts) == {
        "patch.size": [96, 96, 96],
        "training.seed": 3,
        "a": 1e-3,
        "b": True,
        "c": [1, 2],
        "d": "bf16",
        "e": "x=y",
        "f": [0.5, 2],
    }


@pytest.mark.parametrize("text", ["patch.size", "=3", "patch.size=", " = "])
def test_a_setting_needs_both_sides(text):
    with pytest.raises(PlanError, match="expected FIELD=VALUE") as caught:
        parse_settings([text])
    assert caught.value.code == "bad_setting"


def test_a_field_is_set_once():
    with pytest.raises(PlanError, match=r"patch\.size: given twice"):
        parse_settings(["patch.size=1,2,3", "patch.size=3,2,1"])


def test_values_change_and_their_origin_is_recorded():
    settings = parse_settings(
        [
            "patch.size=96,80,64",
            "network.kernel_size=7",
            "training.optimizer.learning_rate=1",
            "training.precision=bf16",
        ]
    )
    changed = override(PLAN, settings, origin="--set")
    assert changed.patch.size == (96, 80, 64)
    assert changed.network.kernel_size == 7
    assert changed.training.optimizer.learning_rate == 1.0
    assert changed.training.precision == "bf16"
    assert {name: changed.reasons[name] for name in settings} == dict.fromkeys(settings, "--set")
    assert changed.reasons["schedule.steps"] == PLAN.reasons["schedule.steps"]
    assert PLAN.patch.size == (48, 64, 80)
    assert Plan.from_json(changed.to_json()) == changed


def test_no_settings_no_change():
    assert override(PLAN, {}, origin="--set") is PLAN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("patch.sise", "patch has no field 'sise'. Did you mean 'size'"),
        ("pach.size", "a plan has no field 'pach'. Did you mean 'patch'"),
        ("training.optimizer.lr", "training.optimizer has no field 'lr'. Known: .*learning_rate"),
        ("patch.size.d", "patch.size has no field 'd'"),
        ("training.optimizer", "is a group of fields; set one of .*learning_rate"),
        ("reasons.patch", "a plan has no field 'reasons'"),
        ("schema_version", "a plan has no field 'schema_version'"),
    ],
)
def test_an_unknown_field_gets_a_suggestion(name, message):
    with pytest.raises(PlanError, match=message) as caught:
        override(PLAN, {name: 1}, origin="--set")
    assert caught.value.code == "unknown_field"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("patch.size", [96, 96], "^patch.size: not valid. patch.size.2: Field required"),
        ("patch.size", [96, 96, 0], "greater than or equal to 1"),
        ("training.batch_size", "two", "training.batch_size: .*given 'two'"),
        ("training.batch_size", 2.5, "training.batch_size"),
        ("training.optimizer.learning_rate", True, "training.optimizer.adamw.learning_rate"),
        ("network.channels", 0, "at least 1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name, value, message):
    with pytest.raises(PlanError, match=message):
        override(PLAN, {name: value}, origin="--set")


def test_switching_deep_supervision_refits_the_loss():
    off = override(PLAN, {"network.deep_supervision": False}, origin="--set")
    assert off.training.loss.deep_supervision_weights == (1.0,)
    on = override(off, {"network.deep_supervision": True}, origin="--set")
    assert on.training.loss.deep_supervision_weights == deep_supervision_weights(5)
    weights = [0.6, 0.1, 0.1, 0.1, 0.1]
    chosen = {"network.deep_supervision": True, "training.loss.deep_supervision_weights": weights}
    assert override(off, chosen, origin="--set").training.loss.deep_supervision_weights == tuple(weights)


def test_deep_supervision_weights_are_mednexts():
    assert deep_supervision_weights(1) == (1.0,)
    assert deep_supervision_weights(5) == pytest.approx((0.5161, 0.2581, 0.1290, 0.0645, 0.0323), abs=5e-5)
    assert sum(deep_supervision_weights(5)) == pytest.approx(1.0)


def test_fields_that_are_left_out_at_their_defaults_can_be_set():
    changed = override(PLAN, {"network.decoder_kernel_size": 5, "preprocessing.transpose": [1, 0, 2]}, origin="test")
    assert changed.network.decoder_kernel_size == 5
    assert changed.preprocessing.transpose == (1, 0, 2)
    assert "decoder_kernel_size" not in PLAN.to_json() and "transpose" not in PLAN.to_json()
    assert '"decoder_kernel_size": 5' in changed.to_json()


def test_a_group_of_several_forms_is_set_as_a_whole_and_forgets_the_reasons_inside():
    plan = PLAN.replace(reasons={"training.optimizer.eps": "old", "training.optimizer": "older", "patch.size": "kept"})
    sgd = {"kind": "sgd", "learning_rate": 0.01, "weight_decay": 0.0}
    changed = override(plan, {"training.optimizer": sgd}, origin="--set")
    assert changed.training.optimizer == SGD(learning_rate=0.01, weight_decay=0.0)
    assert changed.reasons == {"training.optimizer": "--set", "patch.size": "kept"}
    for name, value in (("patch", {"size": [1, 2, 3]}), ("network", {"kind": "segformer3d"})):
        with pytest.raises(PlanError, match="group of fields"):
            override(PLAN, {name: value}, origin="--set")


def test_a_network_is_overridden_alone():
    settings = {"network.kernel_size": 7, "patch.size": [8, 8, 8]}
    assert override_network(PLAN.network, settings) == PLAN.network.replace(kernel_size=7)
    assert override_network(PLAN.network, {"patch.size": [8, 8, 8]}) is PLAN.network
    with pytest.raises(PlanError, match=r"network\.kernel_size"):
        override_network(PLAN.network, {"network.kernel_size": 4})
    with pytest.raises(PlanError, match="Did you mean 'kernel_size'"):
        override_network(PLAN.network, {"network.kernel_sise": 5})


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "betas": [0.9, 1.0]}, r"adamw\.betas\.1"),
        ({"kind": "muon", "learning_rate": 1e-3, "weight_decay": 0.0, "betas": [1.0, 0.9]}, r"muon\.betas\.0"),
        ({"kind": "muon", "learning_rate": 1e-3, "weight_decay": 0.0, "momentum": 1.0}, r"muon\.momentum"),
        ({"kind": "sgd", "learning_rate": 1e-3, "weight_decay": 0.0, "momentum": 1}, r"sgd\.momentum"),
    ],
)
def test_a_mean_that_keeps_all_of_what_was_before_is_refused(value, field):
    with pytest.raises(PlanError, match=rf"training\.optimizer\.{field}: Input should be less than 1"):
        override(PLAN, {"training.optimizer": value}, origin="--set")


@pytest.mark.parametrize(
    ("dataset", "pair", "told"),
    [
        (CLASSES, [2, 300, 7], r"label values \[7\]; expected two of \[2, 300\]"),
        (CLASSES, [2, 2, 9], r"label values \[9\]; expected two of"),
        (REGIONS, [2, 1, 2], r"makes of 'core' \[2, 4\] what is no label of the data set"),
    ],
)
def test_pairs_that_would_end_training_are_refused_in_the_plan(dataset, pair, told):
    plan = PLAN.replace(
        dataset=dataset,
        preprocessing=PLAN.preprocessing.replace(
            normalization=PLAN.preprocessing.normalization[: len(dataset.channel_names)]
        ),
    )
    with pytest.raises(PlanError, match=told):
        override(plan, {"training.augmentation.swapped_labels": [pair]}, origin="--set")


def test_pairs_that_keep_every_label_whole_are_taken():
    for dataset, pair in ((CLASSES, [2, 2, 300]), (REGIONS, [2, 2, 4])):
        schemes = PLAN.preprocessing.normalization[: len(dataset.channel_names)]
        plan = PLAN.replace(dataset=dataset, preprocessing=PLAN.preprocessing.replace(normalization=schemes))
        changed = override(plan, {"training.augmentation.swapped_labels": [pair]}, origin="--set")
        assert changed.training.augmentation.swapped_labels == (tuple(pair),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("schedule.step", r"schedule\.step: schedule has no field 'step'\. Did you mean 'steps'\?"),
        ("scedule.steps", r"scedule\.steps: a plan has no field 'scedule'\. Did you mean 'schedule'\?"),
        ("training.optimizer.learning_rat", r"training\.optimizer has no field 'learning_rat'"),
        ("training.seed.more", r"training\.seed has no field 'more'"),
        ("preprocessing.normalization.kind", r"preprocessing\.normalization has no field 'kind'"),
        ("reasons.network", "a plan has no field 'reasons'"),
    ],
)
def test_a_name_that_no_plan_has_is_refused_before_there_is_one(name, message):
    with pytest.raises(PlanError, match=message) as caught:
        require_known_fields(["patch.size", name])
    assert caught.value.code == "unknown_field"


def test_every_name_of_a_plan_is_known_before_there_is_one():
    def names(node, path=()):
        for key, value in node.items() if isinstance(node, dict) else ():
            if (*path, key)[0] not in ("reasons", "schema_version"):
                yield ".".join((*path, key))
                yield from names(value, (*path, key))

    tree = PLAN.model_dump(mode="json", context=EVERY_FIELD)
    known = list(names(tree))
    assert {"schedule.steps", "training.optimizer.kind", "network.channels"} <= set(known)
    require_known_fields(known)
    # Of other networks, optimisers and starts too.
    others = ("network.embed_dims", "training.optimizer.momentum", "training.initialization.freeze_encoder_steps")
    require_known_fields(others)
