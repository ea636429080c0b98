"""The steps of the speaker pipeline one after the other, small, in this process, without Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from goldcrest.cluster.api import Artifact, InputError, StepError
from goldcrest.tasks.bundles import load_state
from goldcrest.tasks.data.audio import from_pcm16
from goldcrest.tasks.data.frames import FrameReader
from goldcrest.tasks.speaker.bundle import (
    alike,
    bundle_bytes,
    load_bundle,
    load_network,
    read_description,
)
from goldcrest.tasks.speaker.choose_clusters import ChooseClustersConfig, choose_clusters
from goldcrest.tasks.speaker.choose_labels import (
    CandidatesConfig,
    ChooseLabelsConfig,
    choose_labels,
)
from goldcrest.tasks.speaker.cluster import ClusterConfig, cluster
from goldcrest.tasks.speaker.embed import EmbedConfig, embed
from goldcrest.tasks.speaker.evaluate import EvaluateConfig, evaluate
from goldcrest.tasks.speaker.features import FeatureConfig, features
from goldcrest.tasks.speaker.frontend import FrontEnd, FrontEndConfig
from goldcrest.tasks.speaker.ivector import IvectorConfig, ivector
from goldcrest.tasks.speaker.labels import compact
from goldcrest.tasks.speaker.prepare import PrepareConfig, prepare
from goldcrest.tasks.speaker.pretrain import PretrainConfig, pretrain
from goldcrest.tasks.speaker.publish import PublishConfig, publish
from goldcrest.tasks.speaker.quantize import QuantizeConfig, quantize
from goldcrest.tasks.speaker.sparse_finetune import SparseConfig, sparse_finetune
from goldcrest.tasks.speaker.trials import given_trials
from goldcrest.tasks.speaker.true_labels import TrueLabelsConfig, true_labels
from goldcrest.tasks.speaker.vectors import read_vectors

NETWORK = {
    "channels": 16,
    "mfa_channels": 24,
    "attention_channels": 8,
    "se_channels": 8,
    "embedding_dim": 12,
}
IVECTOR = IvectorConfig(
    covariance="full",
    diagonal={"gaussians": 8, "iterations": 4},
    full={"iterations": 1},
    ubm_passes=1,
    statistics={"scale": 0.1, "second_order": "full", "selected": 4},
    model={"dimensions": 6, "iterations": 2, "minimum_count": 1.0},
    whitening=0.5,
    shard_utterances=7,
)


def training(epochs: int) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": 8, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Every artifact of the chain by the name of its step."""
    from goldcrest.cluster.artifact import Output, describe_files
    from goldcrest.cluster.runtime import LocalRuntime

    root = tmp_path_factory.mktemp("chain")
    done: dict[str, Artifact] = {}

    def run(name: str, task: Any, cfg: Any, *inputs: Any) -> None:
        folder = root / name
        folder.mkdir()
        scratch = root / f"{name}-scratch"
        out = Output(folder, runtime=LocalRuntime(), seed=0, scratch=scratch)
        task(cfg, *inputs, out=out)
        done[name] = Artifact(
            folder,
            {
                "key": "0" * 64,
                "step": name,
                "files": describe_files(folder),
                "metrics": out.collected_metrics,
                "measurements": out.measurements,
            },
        )

    run("corpus", prepare, PrepareConfig(embedded={"speakers": 8, "utterances": 3}, eval_share=0.5))
    run(
        "features",
        features,
        FeatureConfig(augment={"copies": 1}, fbank={"mel_bins": 24}, deltas=1),
        done["corpus"],
    )
    run("ivectors", ivector, IVECTOR, done["features"])
    run("choice", choose_clusters, ChooseClustersConfig(), done["ivectors"])
    kmeans = ClusterConfig(method="kmeans", clusters=4)
    run("kmeans", cluster, kmeans, done["ivectors"], None, done["corpus"])
    run("truth", true_labels, TrueLabelsConfig(), done["corpus"])
    run(
        "dense",
        pretrain,
        PretrainConfig(
            network=NETWORK,
            margin_settings={"scale": 10.0},
            crop_frames=(60, 60),
            training=training(40),
        ),
        done["features"],
        done["truth"],
    )
    run(
        "sparse",
        sparse_finetune,
        SparseConfig(sparsity=0.7, crop_frames=(40, 60), calibration=8, training=training(2)),
        done["dense"],
        done["features"],
        done["truth"],
    )
    run("int8", quantize, QuantizeConfig(calibration=8), done["sparse"], done["features"])
    run("embed", embed, EmbedConfig(shard_utterances=5), done["dense"], done["features"])
    run(
        "evaluate",
        evaluate,
        EvaluateConfig(bootstrap=20, timed_utterances=3, cohort=9),
        *(done[n] for n in ("corpus", "features", "ivectors", "dense", "sparse", "int8")),
    )
    return done


def test_features_are_those_of_one_waveform_alone(chain: dict[str, Artifact]) -> None:
    """Batches, workers and files change nothing: row = front end of that utterance."""
    front_end = FrontEnd(FrontEndConfig(**chain["features"].json("frontend")))
    table = chain["corpus"].table("utterances")
    mfcc = FrameReader(chain["features"].file("mfcc.arrow"))
    fbank = FrameReader(chain["features"].file("fbank.arrow"))
    for number in (0, 5, 11):
        name = table["id"][number].as_py()
        samples = from_pcm16(table["audio"][number].as_py())
        assert np.allclose(mfcc[mfcc.rows()[name]], front_end.mfcc(samples), atol=1e-4)
        assert np.allclose(fbank[fbank.rows()[name]], front_end.fbank(samples), atol=2e-2)


def test_the_network_may_see_mfcc() -> None:
    """Chapter 10 trains on 40 MFCC; the mean of every coefficient is then zero."""
    front_end = FrontEnd(FrontEndConfig(network_input="mfcc"))
    samples = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    frames = front_end.fbank(samples)
    assert frames.shape == (50, 40)
    assert np.abs(frames.mean(0)).max() < 1e-3
    shifted = FrontEnd(FrontEndConfig(fbank_mean_share=0.0, fbank_offset=2.0, fbank_scale=4.0))
    plain = FrontEnd(FrontEndConfig(fbank_mean_share=0.0))
    assert shifted.fbank(samples) == pytest.approx((plain.fbank(samples) - 2) / 4, abs=1e-4)


def test_only_training_utterances_are_augmented(chain: dict[str, Artifact]) -> None:
    index = chain["features"].table("index").to_pylist()
    assert {row["split"] for row in index if row["copy"] == 1} == {"train"}
    reader = FrameReader(chain["features"].file("fbank.arrow"))
    name, clean = next(iter(reader.rows(0).items()))
    if name in reader.rows(1):
        copy = reader[reader.rows(1)[name]]
        assert copy.shape[1] == reader[clean].shape[1]
        assert copy.shape != reader[clean].shape or not np.allclose(copy, reader[clean], atol=0.1)


def test_features_are_the_same_without_speakers(chain: dict[str, Artifact], run_task) -> None:
    """Also babble, which is drawn from other utterances: no label reaches what is trained on."""
    import pyarrow.parquet as pq

    from goldcrest.cluster.artifact import describe_files

    blind = chain["corpus"].path.parent / "blind"
    shutil.copytree(chain["corpus"].path, blind)
    for shard in (blind / "utterances").iterdir():
        table = pq.read_table(shard)
        place = table.column_names.index("speaker")
        nobody = pa.nulls(table.num_rows, pa.string())
        pq.write_table(table.set_column(place, "speaker", nobody), shard)
    manifest = {**chain["corpus"].manifest, "files": describe_files(blind)}
    cfg = FeatureConfig(augment={"copies": 2, "kinds": ("babble",)}, fbank={"mel_bins": 24})
    known, unknown = (
        run_task(features, cfg, corpus) for corpus in (chain["corpus"], Artifact(blind, manifest))
    )
    for name in ("mfcc.arrow", "fbank.arrow"):
        assert known.file(name).read_bytes() == unknown.file(name).read_bytes(), name


def test_another_speed_is_another_speaker_to_the_network(
    chain: dict[str, Artifact], run_task
) -> None:
    from goldcrest.kernels.frontend.speed import change_speed
    from goldcrest.tasks.speaker.pretrain import read_examples

    plain = chain["features"]
    cfg = FeatureConfig(
        augment={"copies": 1}, fbank={"mel_bins": 24}, deltas=1, speeds=(0.9, 1.1), batch_rows=5
    )
    made = run_task(features, cfg, chain["corpus"])
    assert made.table("index").equals(plain.table("index"))  # i-vectors know nothing of it
    one, all_of_them = (read_examples(each, chain["truth"], 2) for each in (plain, made))
    count = len(one.labels)
    assert (all_of_them.classes, len(all_of_them.labels)) == (3 * one.classes, 3 * count)
    assert np.array_equal(all_of_them.rows[:count], one.rows)
    front_end = FrontEnd(FrontEndConfig(**made.json("frontend")))
    table = chain["corpus"].table("utterances")
    spoken = dict(zip(table["id"].to_pylist(), table["audio"].to_pylist(), strict=True))
    for number in (0, count - 1):
        name = one.reader.ids[one.rows[number, 0]]
        for place, speed in enumerate((0.9, 1.1), start=1):
            row = place * count + number
            assert all_of_them.labels[row] == one.labels[number] + place * one.classes
            faster = change_speed(torch.from_numpy(from_pcm16(spoken[name])), speed)
            frames = all_of_them.reader[int(all_of_them.rows[row, -1])]
            assert np.allclose(frames, front_end.fbank(faster.numpy()), atol=2e-2)
    settings: dict[str, Any] = {"crop_frames": (60, 60), "training": training(2)}
    dense = run_task(pretrain, PretrainConfig(network=NETWORK, **settings), made, chain["truth"])
    assert read_description(dense.path)["classes"] == 3 * one.classes
    pruned = SparseConfig(sparsity=0.5, calibration=8, **settings)
    sparse = run_task(sparse_finetune, pruned, dense, made, chain["truth"])
    assert sparse.metrics["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("speeds", [(1.0,), (0.9, 0.9), (0.3,)])
def test_speeds_must_differ_from_speech_and_each_other(speeds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="speeds"):
        FeatureConfig(speeds=speeds)


def test_ivectors_have_unit_length_and_pairs_by_id(chain: dict[str, Artifact]) -> None:
    found = read_vectors(chain["ivectors"], "train")
    assert np.linalg.norm(found.matrix, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert found.augmented.shape == (1, len(found.ids), 6)
    cosine = (found.matrix * found.augmented[0]).sum(1).mean()
    strangers = (found.matrix * np.roll(found.augmented[0], 7, axis=0)).sum(1).mean()
    assert cosine > strangers + 0.1


def test_shards_change_nothing(chain: dict[str, Artifact], run_task) -> None:
    whole = run_task(
        ivector, IVECTOR.model_copy(update={"shard_utterances": 999}), chain["features"]
    )
    a, b = (x.matrix("vectors", "vector") for x in (whole, chain["ivectors"]))
    assert np.allclose(a, b, atol=1e-4)


def test_the_recipes_savings_change_little(chain: dict[str, Artifact], run_task) -> None:
    """Every other frame and the best Gaussians for the UBM, the longest utterances after it."""
    from goldcrest.tasks.speaker.ivector import longest

    reader = FrameReader(chain["features"].file("mfcc.arrow"))
    rows = np.flatnonzero(reader.copies == 0)
    few = longest(reader, rows, 4)
    assert len(few) == 4
    assert set(few) <= set(rows)
    assert reader.lengths[few].min() >= np.sort(reader.lengths[rows])[-4]
    assert np.array_equal(longest(reader, rows, None), rows)
    whole = chain["ivectors"].tensors("extractor")
    for saving in ({"ubm_frame_step": 2}, {"ubm_selected": 3}, {"extractor_utterances": 6}):
        thrifty = run_task(ivector, IVECTOR.model_copy(update=saving), chain["features"])
        found = thrifty.tensors("extractor")
        changed = {name for name, tensor in found.items() if not torch.equal(tensor, whole[name])}
        in_ubm = any(name.startswith("ubm.") for name in changed)
        assert changed, saving
        assert in_ubm == ("extractor_utterances" not in saving), saving
        spread = whole["ubm.means"].std()
        assert float((found["ubm.means"] - whole["ubm.means"]).abs().mean()) < 0.3 * float(spread)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_ivectors_of_a_gpu_are_those_of_the_cpu(
    chain: dict[str, Artifact], run_task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from goldcrest.cluster.runtime import LocalRuntime

    monkeypatch.setattr(LocalRuntime, "gpus", 1.0)
    found = run_task(ivector, IVECTOR, chain["features"])
    a, b = (x.matrix("vectors", "vector") for x in (found, chain["ivectors"]))
    assert np.allclose(a, b, atol=1e-3)


def test_the_extractor_never_sees_evaluation_speakers(chain: dict[str, Artifact], run_task) -> None:
    """Evaluation rows replaced by zeros: the extractor's tensors stay the same bytes."""
    folder = chain["features"].path.parent / "tampered"
    if not folder.exists():
        shutil.copytree(chain["features"].path, folder)
    index = chain["features"].table("index")
    is_eval = np.array(index["split"].to_pylist()) == "eval"
    table = pa.ipc.open_file(str(folder / "mfcc.arrow")).read_all()
    frames = table["frames"].to_pylist()
    frames = [bytes(len(row)) if flag else row for row, flag in zip(frames, is_eval, strict=True)]
    noisy = table.set_column(2, "frames", pa.array(frames, pa.large_binary()))
    with (
        pa.OSFile(str(folder / "mfcc.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as w,
    ):
        w.write_table(noisy)
    from goldcrest.cluster.artifact import describe_files

    manifest = {**chain["features"].manifest, "files": describe_files(folder)}
    again = run_task(ivector, IVECTOR, Artifact(folder, manifest))
    for name, tensor in chain["ivectors"].tensors("extractor").items():
        assert torch.equal(tensor, again.tensors("extractor")[name]), name


def test_clustering_metrics_do_not_steer_the_labels(chain: dict[str, Artifact], run_task) -> None:
    cfg = ClusterConfig(method="kmeans", clusters=4)
    blind = run_task(cluster, cfg, chain["ivectors"], None, None)
    assert blind.table("labels").equals(chain["kmeans"].table("labels"))
    assert "nmi" not in blind.metrics["clustering"]["kmeans"]
    assert 0 <= chain["kmeans"].metrics["clustering"]["kmeans"]["nmi"] <= 1


def test_more_clusters_than_utterances_is_a_sentence(chain: dict[str, Artifact], run_task) -> None:
    with pytest.raises(StepError, match="cannot make 500 clusters"):
        many = ClusterConfig(method="kmeans", clusters=500)
        run_task(cluster, many, chain["ivectors"], None, None)


def test_the_number_of_clusters_can_be_chosen(chain: dict[str, Artifact], run_task) -> None:
    cfg = ClusterConfig(method="ahc")
    made = run_task(cluster, cfg, chain["ivectors"], chain["choice"], None)
    chosen = chain["choice"].json("clusters")["clusters"]
    assert made.metrics["clustering"]["ahc"]["clusters"] == chosen
    with pytest.raises(StepError, match="nothing has chosen"):
        run_task(cluster, cfg, chain["ivectors"], None, None)


def test_candidates_are_chosen_without_labels(chain: dict[str, Artifact], run_task) -> None:
    base = ClusterConfig(
        clusters=4,
        settings={"hidden": [16], "terms": {"imsat": 1.0}},
        training={"epochs": 3, "batch_size": 12, "optimizer": "adam", "learning_rate": 0.01},
    )
    candidates = CandidatesConfig(changes=({"mu": 1.0}, {"mu": 4.0}), seeds=2)
    runs = candidates.runs(base)
    assert list(runs) == ["0_0", "0_1", "1_0", "1_1"]
    assert [each.settings["mu"] for each, _ in runs.values()] == [1.0, 1.0, 4.0, 4.0]
    tried = {
        name: run_task(cluster, each, chain["ivectors"], None, None, seed=seed)
        for name, (each, seed) in runs.items()
    }
    cfg = ChooseLabelsConfig(label="cimc", candidates=candidates)
    blind, seeing = (
        run_task(choose_labels, cfg, chain["ivectors"], chain["kmeans"], corpus, **tried)
        for corpus in (None, chain["corpus"])
    )
    assert blind.table("labels").equals(seeing.table("labels"))  # truth changes no choice
    rows = blind.json("selection")
    assert [row["change"] for row in rows] == [{"mu": 1.0}, {"mu": 4.0}]
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["agreement"] == max(row["agreement"] for row in rows)
    number = rows.index(chosen)
    assert any(
        blind.table("labels").equals(tried[f"{number}_{seed}"].table("labels")) for seed in (0, 1)
    )
    assert "ami" not in rows[0] and "nmi" not in blind.metrics["clustering"]["cimc"]
    assert "nmi" in seeing.metrics["clustering"]["cimc"]
    assert {"ami"} < set(seeing.json("selection")[0])
    with pytest.raises(ValueError, match="nu"):
        CandidatesConfig(changes=({"nu": 1.0},)).runs(base)


def test_compact_labels_have_no_gaps() -> None:
    assert compact(np.array([7, 3, 7, 9])).tolist() == [1, 0, 1, 2]


def test_the_margin_grows_to_its_value() -> None:
    from goldcrest.kernels.margin import aam
    from goldcrest.tasks.speaker.objective import SpeakerObjective

    settings = aam.Settings(margin=0.2)
    head = aam.Head(4, 3, settings)
    objective = SpeakerObjective.__new__(SpeakerObjective)
    objective.margin_settings, objective.margin_warmup = settings, 4
    margins = []
    for epoch in (0, 2, 4, 9):
        objective._grow_margin(head, epoch)
        margins.append(head.settings.margin)
    assert margins == pytest.approx([0.0, 0.1, 0.2, 0.2])


def test_training_lowers_the_loss(chain: dict[str, Artifact]) -> None:
    losses = [row["loss"] for row in chain["dense"].json("history")]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])  # one batch an epoch is noisy


def test_the_sparse_bundle_is_sparse_and_smaller(chain: dict[str, Artifact]) -> None:
    network = load_network(chain["sparse"].path)
    assert chain["sparse"].metrics["sparsity"]["pruned_layers"] == pytest.approx(0.7, abs=0.01)
    zeros = float((network.aggregate.weight == 0).float().mean())
    assert zeros == pytest.approx(0.7, abs=0.01)
    assert bundle_bytes(chain["sparse"].path) < bundle_bytes(chain["dense"].path)


def test_int8_weights_are_stored_as_integers(chain: dict[str, Artifact]) -> None:
    state = load_state(chain["int8"].path)
    assert any(value.dtype == torch.int8 for value in state.values())
    assert bundle_bytes(chain["int8"].path) < bundle_bytes(chain["sparse"].path)
    assert chain["int8"].metrics["int8"]["embedding_cosine"] > 0.97


def test_a_bundle_computes_on_the_device_that_is_asked(chain: dict[str, Artifact]) -> None:
    """The device "meta" stands for one that this machine lacks: it has no numbers to give back.
    INT8 operators are the CPU's."""
    frames = np.random.default_rng(0).standard_normal((60, 24)).astype(np.float32)
    for name in ("dense", "sparse"):
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            load_bundle(chain[name].path, "meta").embed(frames)
    here, there = (load_bundle(chain["int8"].path, device) for device in ("cpu", "meta"))
    assert np.array_equal(here.embed(frames), there.embed(frames))


@pytest.mark.parametrize("name", ["dense", "sparse", "int8"])
def test_a_bundle_alone_embeds_a_waveform(
    chain: dict[str, Artifact], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for member in ("bundle.json", "model.safetensors"):
        shutil.copy(chain[name].path / member, folder)
    model = load_bundle(folder)
    data = chain["corpus"].table("utterances")["audio"][0].as_py()
    vector = model.embed_waveform(from_pcm16(data))
    assert vector.shape == (12,)
    assert np.isfinite(vector).all()


def test_a_batch_is_its_utterances_alone(chain: dict[str, Artifact]) -> None:
    """Padding is masked: what shares a pass does not matter beyond float32's rounding."""
    rng = np.random.default_rng(0)
    for name in ("dense", "sparse", "int8"):
        model = load_bundle(chain[name].path)
        width = model.front_end.fbank(np.ones(16_000, np.float32)).shape[1]
        lengths = (120, 35, 131, 120, 60, 72)
        frames = [rng.standard_normal((n, width)).astype(np.float32) for n in lengths]
        alone = np.stack([model.embed(each) for each in frames])
        together = model.embed_batch(frames)
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-4 * float(np.abs(alone).max())), (
            name
        )


def test_similar_lengths_share_a_pass() -> None:
    assert alike([100, 300, 110, 126, 301, 99]) == [[5, 0, 2], [3], [1, 4]]
    assert alike([7]) == [[0]]
    assert alike([100, 125, 126]) == [[0, 1], [2]]


def test_embeddings_are_the_bundles(chain: dict[str, Artifact]) -> None:
    reader = FrameReader(chain["features"].file("fbank.arrow"))
    one = load_bundle(chain["dense"].path).embed(reader[3])
    row = chain["embed"].matrix("vectors", "vector")[3]
    assert one / np.linalg.norm(one) == pytest.approx(row, abs=1e-5)


def test_a_wrong_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bundle\.json can't be read"):
        read_description(tmp_path)
    (tmp_path / "bundle.json").write_text('{"kind": "cake"}')
    with pytest.raises(InputError, match="speaker-embedding"):
        read_description(tmp_path)
    (tmp_path / "bundle.json").write_text('{"kind": "speaker-embedding", "schema": 99}')
    with pytest.raises(InputError, match="schema 99"):
        read_description(tmp_path)
    (tmp_path / "bundle.json").write_text('{"kind": "speaker-embedding", "schema": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match=r"model\.safetensors can't be read"):
        load_state(tmp_path)


def test_evaluation_reports_every_system(chain: dict[str, Artifact]) -> None:
    metrics = chain["evaluate"].metrics
    systems = {"meanstd", "ivector", "dense", "sparse", "int8", "fusion"}
    for section in ("verification", "verification_seen"):
        assert set(metrics[section]) == systems
        # The cohort is of other speakers, so there is none for trials among the training speakers.
        assert ("eer_cosine" in metrics[section]["dense"]) == (section == "verification")
        for found in metrics[section].values():
            assert 0 <= found["eer"] <= 100
            assert found["eer_ci"][0] <= found["eer_ci"][1]
            assert {"min_dcf_0.01", "min_dcf_0.05", "trials"} <= set(found)
    assert set(metrics["models"]) == {"dense", "sparse", "int8"}
    assert metrics["models"]["dense"]["parameters"] == metrics["models"]["sparse"]["parameters"]
    speed = chain["evaluate"].manifest["measurements"]["models"]
    assert all(speed[name]["latency_ms_p50"] > 0 for name in ("dense", "sparse", "int8"))


def test_a_published_bundle_carries_thresholds_and_a_card_with_error_rates(
    chain: dict[str, Artifact], run_task
) -> None:
    scores = chain["evaluate"].table("scores_verification")
    target = np.array(scores["target"])
    for form in ("dense", "sparse", "int8"):
        made = run_task(publish, PublishConfig(licence="CC0"), chain[form], chain["evaluate"])
        wave = np.linspace(-0.1, 0.1, 16_000, dtype=np.float32)
        before = load_bundle(chain[form].path).embed_waveform(wave)
        assert np.array_equal(load_bundle(made.path).embed_waveform(wave), before)
        known = made.json("calibration")
        assert (known["system"], known["score"], known["trials"]) == (form, "cosine", len(target))
        histogram = known["histogram"]
        assert sum(histogram["target"]) == target.sum()
        assert sum(histogram["nontarget"]) == (~target).sum()
        # At the threshold of the equal error rate as many are wrongly accepted as rejected.
        cosine = np.array(scores[f"{form}_cosine"])
        accepted = cosine >= known["thresholds"]["eer"]
        rates = accepted[~target].mean(), (~accepted)[target].mean()
        steps = 1 / target.sum() + 1 / (~target).sum()
        assert abs(rates[0] - rates[1]) <= steps
        assert (cosine[~target] >= known["thresholds"]["far_0.1"]).mean() <= 0.1
        card = (made.path / "MODEL_CARD.md").read_text("utf-8")
        reported = chain["evaluate"].metrics["verification"][form]
        assert f"| equal error rate, unseen speakers | {reported['eer']:.2f} %" in card
        assert known["eer"] == reported["eer_cosine"]
        assert "Licence: CC0." in card


def test_without_labels_a_bundle_has_no_thresholds(chain: dict[str, Artifact], run_task) -> None:
    corpus = relabelled(chain["corpus"], "unlabelled", None)
    inputs = [chain[n] for n in ("features", "ivectors", "dense")]
    cfg = EvaluateConfig(bootstrap=10, timed_utterances=1)
    evaluation = run_task(evaluate, cfg, corpus, *inputs, None, None)
    made = run_task(publish, PublishConfig(), chain["dense"], evaluation)
    assert "calibration.json" not in made
    assert "equal error rate" not in (made.path / "MODEL_CARD.md").read_text("utf-8")
    assert made.json("bundle")["measured"]["bytes"] > 0


def test_unseen_trials_hold_no_training_speaker(chain: dict[str, Artifact]) -> None:
    facts = chain["corpus"].table("facts").to_pylist()
    trained = {row["id"] for row in facts if row["split"] == "train"}
    scores = chain["evaluate"].table("scores_verification")
    used = {*scores["first"].to_pylist(), *scores["second"].to_pylist()}
    assert used
    assert not used & trained


def test_a_given_trial_list(chain: dict[str, Artifact], run_task, tmp_path: Path) -> None:
    inputs = [chain[n] for n in ("corpus", "features", "ivectors", "dense")]
    facts = chain["corpus"].table("facts").to_pylist()
    by_speaker: dict[str, list[str]] = {}
    for row in facts:
        if row["split"] == "eval":
            by_speaker.setdefault(row["speaker"], []).append(row["id"])
    (a, b, *_), (c, *_) = list(by_speaker.values())[:2]
    trained = next(row["id"] for row in facts if row["split"] == "train")
    path = tmp_path / "trials.txt"
    path.write_text(f"1 {a} {b}\n0 {a} {c.partition('/')[2]}\n")
    cfg = EvaluateConfig(trials=str(path), bootstrap=10, timed_utterances=1)
    made = run_task(evaluate, cfg, *inputs, None, None)
    assert made.metrics["verification"]["dense"]["trials"] == 2
    assert "sparse" not in made.metrics["verification"]
    for text, words in (
        ("1 a\n", "label utterance"),
        ("1 x y\n", "'x' is not"),
        ("", "target"),
        (f"1 {a} {b}\n0 {a} {trained}\n", "was trained on"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            run_task(evaluate, cfg, *inputs, None, None)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("dense", {"network": None}, "can't be used"),
        ("dense", {"network": {"channels": 1 << 24, "input_dim": 24}}, "can't be used"),
        ("dense", {"front_end": {"nonsense": 1}}, "nonsense"),
        ("dense", "network", "lacks 'network'"),
        ("int8", {"int8": {}}, "lacks|can't be used"),
        ("int8", "front_end", "lacks 'front_end'"),
    ],
)
def test_a_damaged_bundle_is_a_sentence(
    chain: dict[str, Artifact], tmp_path: Path, form: str, change: Any, words: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(chain[form].path, folder)
    facts = read_description(folder)
    if isinstance(change, str):
        del facts[change]
    else:
        facts |= change
    (folder / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=words):
        load_bundle(folder)


def test_a_list_names_recordings_that_were_cut_or_quarantined(
    run_task, speech_folder: Path, tmp_path: Path
) -> None:
    (speech_folder / "speaker0" / "broken.wav").write_bytes(b"RIFF")
    train = tmp_path / "train"
    shutil.copytree(speech_folder / "speaker3", train / "speaker3")
    shutil.rmtree(speech_folder / "speaker3")
    cfg = PrepareConfig(
        paths=(str(train),),
        eval_paths=(str(speech_folder),),
        segment_seconds=1.3,
        max_bad_share=1.0,
    )
    corpus = run_task(prepare, cfg)
    path = tmp_path / "trials.txt"
    path.write_text(
        "1 speaker0/take0.wav speaker0/take1.wav\n0 corpus/speaker0/take2.wav speaker1/take0.wav\n"
        "1 speaker0/broken.wav speaker0/take0.wav\n"
    )

    class Notes:
        """Collects what is noted."""

        notes: dict[str, str]

        def metrics(self, *, notes: dict[str, str]) -> None:
            self.notes = notes

    out = Notes()
    trials = given_trials(path, corpus, out)  # type: ignore[arg-type]
    assert trials.target.tolist() == [True, False]
    assert "1 trials" in out.notes["eval_left_out"]
    cut = trials.segments[trials.names.index("corpus/speaker0/take1.wav")]
    assert cut == ("corpus/speaker0/take1.wav#000", "corpus/speaker0/take1.wav#001")
    vectors = np.random.default_rng(0).normal(size=(len(trials.utterances), 3))
    pooled = trials.pool(vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    place = trials.names.index("corpus/speaker0/take1.wav")
    rows = [trials.utterances.index(name) for name in cut]
    assert np.allclose(pooled[place], unit[rows].mean(0), atol=1e-6)
    path.write_text("1 speaker3/take0.wav speaker3/take1.wav\n")
    with pytest.raises(InputError, match=r"trials\.txt:1: .*was trained on"):
        given_trials(path, corpus, out)  # type: ignore[arg-type]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="can't be read"):
        given_trials(path, corpus, out)  # type: ignore[arg-type]


def relabelled(corpus: Artifact, name: str, speaker: str | None) -> Artifact:
    """A copy of the corpus whose utterances are all of one speaker, or of nobody known."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from goldcrest.cluster.artifact import describe_files

    folder = corpus.path.parent / name
    if not folder.exists():
        shutil.copytree(corpus.path, folder)
    facts = pq.read_table(folder / "facts.parquet")
    speakers = pa.array([speaker] * facts.num_rows, pa.string())
    facts = facts.set_column(facts.schema.get_field_index("speaker"), "speaker", speakers)
    pq.write_table(facts, folder / "facts.parquet")
    return Artifact(folder, {**corpus.manifest, "files": describe_files(folder)})


def test_without_labels_there_are_models_but_no_error_rates(
    chain: dict[str, Artifact], run_task
) -> None:
    corpus = relabelled(chain["corpus"], "unlabelled", None)
    inputs = [chain[n] for n in ("features", "ivectors", "dense")]
    cfg = EvaluateConfig(bootstrap=10, timed_utterances=1)
    made = run_task(evaluate, cfg, corpus, *inputs, None, None)
    assert made.metrics["verification"] == {}
    assert made.metrics["models"]["dense"]["bytes"] > 0
    with pytest.raises(StepError, match="two labelled speakers"):
        run_task(true_labels, TrueLabelsConfig(), corpus)


def test_one_speaker_makes_no_trials_and_the_report_says_why(
    chain: dict[str, Artifact], run_task
) -> None:
    corpus = relabelled(chain["corpus"], "alone", "embedded:only")
    inputs = [chain[n] for n in ("features", "ivectors", "dense")]
    cfg = EvaluateConfig(bootstrap=10, timed_utterances=1)
    made = run_task(evaluate, cfg, corpus, *inputs, None, None)
    assert made.metrics["verification"] == {}
    assert "one speaker" in made.metrics["notes"]["eval_trials"]
    with pytest.raises(StepError, match="two labelled speakers"):
        run_task(true_labels, TrueLabelsConfig(), corpus)


@pytest.mark.parametrize("distillation", ["none", "logits", "feature_mse"])
@pytest.mark.parametrize("method", ["magnitude"])
def test_the_baselines_of_sparse_finetuning(
    chain: dict[str, Artifact], run_task, distillation: str, method: str
) -> None:
    cfg = SparseConfig(
        method=method,
        distillation=distillation,
        sparsity=0.5,
        crop_frames=(40, 60),
        calibration=4,
        training=training(1),
    )
    made = run_task(sparse_finetune, cfg, *(chain[n] for n in ("dense", "features", "truth")))
    assert made.metrics["sparsity"]["pruned_layers"] == pytest.approx(0.5, abs=0.01)
    names = set(made.json("history")[0])
    assert (distillation in names) == (distillation != "none")
