"""`goldcrest doctor`: can this machine run the pipelines, and if not, what is to be done?

Each check is one function that returns one `Check` and never raises. What is heavy or can crash
(starting Ray, importing DeepSpeed, asking the GPU driver) runs in a child process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goldcrest.cluster.doctor_finding import Check, Status, finish, start_child
from goldcrest.cluster.doctor_ray import check_doors, check_ray, other_clusters
from goldcrest.cluster.errors import GoldcrestError
from goldcrest.cluster.masking import mask_text

MIN_MEMORY = 4 << 30
"""Bytes of available memory below which the tiny configurations are at risk."""
MIN_DISK, LOW_DISK = 1 << 30, 10 << 30
"""Free bytes at the store: failure below the first, a warning below the second."""


def diagnose(
    *, store: str, address: str | None = None, tracking_uri: str | None = None
) -> dict[str, Any]:
    """Run every check; `{"ok": bool, "checks": [...]}` with one mapping per `Check`.

    `store` is the store's URI, `address` a Ray cluster to attach to (None: start one here),
    `tracking_uri` an MLflow server to reach (None: only the import is checked).
    """
    others = other_clusters(address)  # before a check starts a Ray of its own
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("cpu", check_cpu),
        ("memory", check_memory),
        ("disk", lambda: check_disk(store)),
        ("store", lambda: check_store(store)),
        ("audio", check_audio),
        ("espeak", check_espeak),
        ("gpu", check_gpu),
        ("mlflow", lambda: check_mlflow(tracking_uri)),
        ("deepspeed", check_deepspeed),
        ("ray", lambda: check_ray(address)),
        ("doors", lambda: check_doors(others)),
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda pair: _guarded(*pair), checks))
    return {
        "ok": all(check.status != "failure" for check in found),
        "checks": [asdict(check) for check in found],
    }


def _guarded(name: str, function: Callable[[], Check]) -> Check:
    """The check's finding; a check that breaks is itself a failure with its reason."""
    started = time.perf_counter()
    try:
        check = function()
    except Exception as error:  # noqa: BLE001 - whatever breaks is the finding
        check = Check(name=name, status="failure", detail=f"{type(error).__name__}: {error}")
    seconds = round(time.perf_counter() - started, 2)
    return Check(**{**asdict(check), "detail": mask_text(check.detail), "seconds": seconds})


# --------------------------------------------------------------------- this process's own checks


def check_python() -> Check:
    """Which interpreter and system this is (an older one cannot even import this file)."""
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return Check(name="python", status="ok", detail=f"{version} on {platform.platform()}")


def check_packages() -> Check:
    """Every dependency that the distribution declares is installed in a version it allows."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("goldcrest") or []
    except importlib.metadata.PackageNotFoundError:
        return Check(
            name="packages",
            status="failure",
            detail="the distribution 'goldcrest' is not installed",
            hint="pip install -c constraints.txt -e .",
        )
    seen, wrong = [], []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        seen.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        hint = "pip install -c constraints.txt -e ."
        return Check(name="packages", status="failure", detail="; ".join(wrong), hint=hint)
    return Check(name="packages", status="ok", detail=", ".join(seen))


def check_cpu() -> Check:
    """Usable cores, and the vector instructions that integer kernels want."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = set(_cpu_flags())
    wanted = ["avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp"]
    have = [flag for flag in wanted if flag in flags]
    detail = (
        f"{cores} usable cores ({platform.machine()}); {', '.join(have) or 'no vector flags seen'}"
    )
    if flags and not have:
        return Check(
            name="cpu", status="warning", detail=detail, hint="INT8 models will not be faster here"
        )
    return Check(name="cpu", status="ok", detail=detail)


def _cpu_flags() -> list[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", path.read_text(), re.MULTILINE)
    return found[1].split() if found else []


def check_memory() -> Check:
    """Enough memory is available, also within the limits of a container."""
    import psutil

    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        used = Path("/sys/fs/cgroup/memory.current")
        if used.is_file():
            available = min(available, total - int(used.read_text()))
    detail = f"{_gib(available)} available of {_gib(total)}"
    if available < MIN_MEMORY:
        hint = f"free memory: the tiny configurations want {_gib(MIN_MEMORY)}"
        return Check(name="memory", status="warning", detail=detail, hint=hint)
    return Check(name="memory", status="ok", detail=detail)


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def check_disk(store: str) -> Check:
    """Enough space is free where a local store lies (and for Ray's temporary files)."""
    import shutil

    places = {"temporary files": Path("/tmp")}
    if "://" not in store or store.startswith("file://"):
        places["store"] = Path(store.removeprefix("file://"))
    free = {}
    for name, path in places.items():
        there = next(
            folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists()
        )
        free[name] = shutil.disk_usage(there).free
    detail = ", ".join(f"{_gib(size)} free for the {name}" for name, size in free.items())
    least = min(free.values())
    if least < LOW_DISK:
        status: Status = "failure" if least < MIN_DISK else "warning"
        hint = "free some space, or place the store elsewhere with --store"
        return Check(name="disk", status=status, detail=detail, hint=hint)
    return Check(name="disk", status="ok", detail=detail)


def check_store(store: str) -> Check:
    """The store opens, and a lease can be taken and given back in it: it is writable."""
    from goldcrest.cluster.store import Store

    key = hashlib.sha256(secrets.token_bytes(16)).hexdigest()
    try:
        opened = Store.open(store)
        with opened.lease(key, owner=f"doctor-{os.getpid()}"):
            pass
    except (GoldcrestError, OSError) as error:
        hint = getattr(error, "hint", None) or "choose a writable place with --store"
        message = getattr(error, "message", str(error))
        return Check(name="store", status="failure", detail=f"{store}: {message}", hint=hint)
    return Check(name="store", status="ok", detail=f"{store} is writable")


def check_audio() -> Check:
    """libsndfile reads the formats of the corpus readers."""
    import soundfile

    formats = soundfile.available_formats()
    missing = [name for name in ("WAV", "FLAC", "OGG", "MP3") if name not in formats]
    detail = f"soundfile {soundfile.__version__} (libsndfile {soundfile.__libsndfile_version__})"
    if missing:
        return Check(
            name="audio",
            status="warning",
            detail=f"{detail} cannot read {', '.join(missing)}",
            hint="install a newer libsndfile",
        )
    return Check(name="audio", status="ok", detail=f"{detail}: WAV, FLAC, OGG, MP3")


def check_espeak() -> Check:
    """The speech synthesiser of the embedded corpus can be loaded."""
    hint = "only the embedded corpus needs it: pip install 'goldcrest[demo]'"
    if importlib.util.find_spec("espeakng_loader") is None:
        return Check(
            name="espeak", status="warning", detail="espeakng-loader is not installed", hint=hint
        )
    import espeakng_loader

    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        library.espeak_Info.restype = ctypes.c_char_p
        version = library.espeak_Info(None).decode()
    except (OSError, AttributeError) as error:
        return Check(name="espeak", status="warning", detail=str(error), hint=hint)
    return Check(name="espeak", status="ok", detail=f"espeak-ng {version}")


# ------------------------------------------------------------------------ checks in a child process

_GPU = """
import json, torch
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                  "devices": [{"name": d.name, "bytes": d.total_memory} for d in devices]}))
"""

_DEEPSPEED = """
import json, deepspeed
print(json.dumps({"version": deepspeed.__version__}))
"""

_MLFLOW = """
import json, sys, mlflow
if sys.argv[1]:
    mlflow.MlflowClient(tracking_uri=sys.argv[1]).search_experiments(max_results=1)
print(json.dumps({"version": mlflow.__version__}))
"""


def check_gpu() -> Check:
    """Which GPUs torch can use; none is no failure."""
    line, reason = finish(start_child(_GPU), "torch")
    if reason:
        return Check(name="gpu", status="failure", detail=reason, hint="reinstall torch")
    facts = json.loads(line)
    if not facts["devices"]:
        driver = Path("/proc/driver/nvidia/version").exists()
        hint = "this torch cannot use the NVIDIA driver seen here; install a CUDA build of torch"
        return Check(
            name="gpu",
            status="warning" if driver else "ok",
            detail=f"no GPU in use (torch {facts['torch']})",
            hint=hint if driver else "",
        )
    names = ", ".join(f"{device['name']} ({_gib(device['bytes'])})" for device in facts["devices"])
    detail = f"{names}; torch {facts['torch']}, CUDA {facts['cuda']}"
    return Check(name="gpu", status="ok", detail=detail)


def check_deepspeed() -> Check:
    """The training engine's library can be imported."""
    line, reason = finish(start_child(_DEEPSPEED), "importing deepspeed")
    if reason:
        hint = "pip install -c constraints.txt deepspeed"
        return Check(name="deepspeed", status="failure", detail=reason, hint=hint)
    return Check(name="deepspeed", status="ok", detail=f"deepspeed {json.loads(line)['version']}")


def check_mlflow(tracking_uri: str | None) -> Check:
    """MLflow can be imported and a given server answers; tracking never fails a run: a warning."""
    retries = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    line, reason = finish(start_child(_MLFLOW, tracking_uri or "", **retries), "mlflow")
    if reason:
        hint = "runs work without it; check --tracking-uri, or use --no-tracking"
        return Check(name="mlflow", status="warning", detail=reason, hint=hint)
    where = tracking_uri or "SQLite inside the store"
    detail = f"mlflow {json.loads(line)['version']}; {where}"
    return Check(name="mlflow", status="ok", detail=detail)


def summary_lines(checks: Sequence[dict[str, Any]]) -> list[str]:
    """The findings as plain lines of text."""
    sign = {"ok": "ok     ", "warning": "warning", "failure": "FAILURE"}
    lines = []
    for check in checks:
        lines.append(f"{sign[check['status']]}  {check['name']:<10} {check['detail']}")
        if check["hint"]:
            lines.append(f"{'':21}{check['hint']}")
    return lines
