"""Every setting of Trainyard, read from `TRAINYARD_*` environment variables.

Each attribute's docstring gives its meaning, unit and the reason for its default.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The configuration of one Trainyard installation."""

    model_config = SettingsConfigDict(
        env_prefix="TRAINYARD_", frozen=True, extra="ignore", use_attribute_docstrings=True
    )

    home: Path = Field(default_factory=lambda: Path.cwd() / ".trainyard")
    """Folder of everything the embedded platform keeps: store, servers, logs, Airflow's files."""

    store: str = ""
    """Where documents, checkpoints and bundles live: a folder or `s3://bucket/prefix`. Empty:
    `store` below the home."""

    s3_endpoint_url: str = ""
    """Endpoint of an S3-compatible store, or of a VPC endpoint, for the store and for S3 sources.
    Empty: AWS's own for the region."""

    s3_region: str = ""
    """Region of the bucket. Empty: as boto3 finds it (AWS_REGION, the profile, the instance)."""

    s3_profile: str = ""
    """Profile of the AWS configuration files. Empty: boto3's usual chain of credentials."""

    s3_addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """How the bucket is named in requests; many S3-compatible stores know only `path`."""

    s3_kms_key_id: str = ""
    """KMS key (id, alias or ARN) that encrypts everything we write. Empty: the bucket's default."""

    s3_bucket_key: bool = True
    """With `s3_kms_key_id`: use an S3 bucket key, which saves most requests to KMS."""

    s3_expected_bucket_owner: str = ""
    """Account id (12 digits) that must own the bucket; S3 refuses every request otherwise. Empty:
    not checked."""

    s3_checksum: Literal["CRC64NVME", "SHA256"] = "CRC64NVME"
    """Checksum that S3 verifies on every upload and part. CRC64NVME costs next to nothing; SHA256
    is for stores that do not know it yet."""

    s3_part_bytes: int = Field(default=16 << 20, ge=5 << 20, le=64 << 20)
    """Bytes of one part of an upload; larger where a file would need more than 10,000 parts. What
    was moved of a part is lost when a process is killed; S3 takes no parts below 5 MiB, and a
    few above 64 MiB would fill the memory that transfers may use."""

    s3_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a connection may be silent before a request counts as failed."""

    s3_attempts: int = Field(default=5, ge=1, le=20)
    """Tries of one request before the store counts as unreachable; pauses between grow to 20 s."""

    aws_connection: str = ""
    """Id of the Airflow connection (type `aws`) whose credentials the steps get in their
    environment. Empty: the usual chain."""

    catalogue: Path = Field(default_factory=lambda: Path.cwd() / "dags" / "models")
    """Folder of the model specs, one `<model>.yaml` each."""

    environments: Path = Field(default_factory=lambda: Path.cwd() / "dags" / "environments.yaml")
    """File that describes the environments."""

    manifests: Path = Field(default_factory=lambda: Path.cwd() / "k8s")
    """Folder of the cluster's manifests, for `trainyard render`."""

    work: Path | None = None
    """Scratch folder of running steps; may be lost at any time. Empty: `work` below the home."""

    node_cache: Path | None = None
    """Folder for files of releases that everything on this machine shares, for `trainyard
    materialize`. Empty: files go straight from the store to where they are served from."""

    node_cache_gib: float = Field(default=0.0, ge=0)
    """GiB (2**30 bytes) that the node cache may hold; what is least recently used goes first.
    0: as much as its disk."""

    serve_python: Path | None = None
    """Python interpreter of the serving environment (vLLM). Empty means `.venv-serve/bin/python`
    beside the home, else the running interpreter."""

    step_lock_s: float = 120.0
    """Seconds after which a step's lock expires unless its holder renews it. Renewed every third of
    it; long enough for a stalled disk, short enough that a killed step can be retried soon."""

    step_lock_wait_s: float = 30.0
    """Seconds a step waits for somebody else's lock before it exits with 75."""

    server_start_timeout_s: float = 600.0
    """Seconds a server may take from its start to its first healthy answer."""

    drain_timeout_s: float = 60.0
    """Seconds a server may take to finish running requests before it is stopped."""

    proxy_port: int = 0
    """Port of the local proxy on loopback; 0 chooses a free one and keeps it for later starts."""

    airflow_port: int = 0
    """Port of the embedded Airflow on loopback; 0 chooses a free one and keeps it."""

    airflow_database: Literal["postgresql", "sqlite"] = "postgresql"
    """Metadata database of the embedded Airflow. SQLite needs no server, but fails under concurrent
    API calls."""

    airflow_url: str = ""
    """Address of the Airflow that `trainyard request` asks. Empty: the embedded platform's."""

    airflow_user: str = ""
    """User at that Airflow."""

    airflow_password: SecretStr = SecretStr("")
    """Password at that Airflow."""

    airflow_token: SecretStr = SecretStr("")
    """Token for that Airflow (`POST /auth/token` makes one), instead of user and password."""

    guard_interval_s: float = 0.5
    """Seconds between two reconciliations of the local route with the channel's wishes."""

    guard_store_interval_s: float = Field(default=2.0, gt=0)
    """Seconds between two looks of a cluster's guard at the store. Everything else it looks at, it
    is told at once."""

    guard_port: int = Field(default=8081, ge=0, le=65535)
    """Port at which the guard, and a proxy that follows a route, tell their health and figures; 0
    chooses a free one."""

    metrics_port: int = Field(default=8082, ge=0, le=65535)
    """Port at which `trainyard metrics` tells Prometheus what the store says; 0 chooses a free
    one."""

    metrics_interval_s: float = Field(default=15.0, gt=0)
    """Seconds between two looks of `trainyard metrics` at the store; each costs a few listings."""

    follow_port: int = Field(default=8080, ge=0, le=65535)
    """Port of a proxy that follows a route, for clients; 0 chooses a free one."""

    listen_host: str = ""
    """Address on which proxies, the cluster's guard and `trainyard metrics` listen. Empty: guard
    and proxies of a cluster on all of the pod's, everything else on loopback."""

    signing_key: SecretStr = SecretStr("")
    """Base64 of the 32-byte Ed25519 seed that signs releases. Empty means a key file below the
    home, made at first use."""

    gc_grace_s: float = Field(default=3 * 86400.0, ge=0)
    """Seconds for which everything in the store is kept after its last change; longer than any step
    takes, so that no work in progress can be taken for a left-over."""

    gc_keep_releases_s: float = Field(default=30 * 86400.0, ge=0)
    """Seconds for which a release is kept with all it names, though no channel has it: as long as
    somebody may still want to promote it."""

    gc_keep_plans_s: float = Field(default=14 * 86400.0, ge=0)
    """Seconds for which a plan protects what its steps read or make, after the last of them wrote
    anything: as long as somebody may still want to clear a failed task and go on."""

    gc_keep_rollouts_s: float = Field(default=90 * 86400.0, ge=0)
    """Seconds for which the log of a rollout is kept; that of a promotion or a rejection is kept
    for good."""

    gc_keep_previous: int = Field(default=3, ge=1)
    """Earlier stable releases of a channel that stay in the store for a rollback. Those whose
    servers are still warm stay as well."""

    gc_pause_s: float = Field(default=60.0, ge=0)
    """Seconds between the two looks of garbage collection: only what nobody needed at both goes."""

    signing_kms_key: str = ""
    """Key in AWS KMS that signs releases instead: key id, key ARN, `alias/…` or alias ARN; the
    private key never leaves AWS."""

    trusted_keys: Path | None = None
    """File of the public keys whose signatures count, as `trainyard keys` writes it. Empty:
    `keys/trusted-keys.json` below the home."""

    builder_id: str = "urn:trainyard:builder"
    """URI that names this installation in the provenance of releases, such as the address of its
    Airflow."""

    registry_username: str = ""
    """User of the OCI registry that releases are exported to. Empty: Docker's own login, or AWS's
    credentials for ECR."""

    registry_password: SecretStr = SecretStr("")
    """Password or token of that user."""

    hub_endpoint: str = ""
    """URL of the Hugging Face Hub or of a mirror. Empty: HF_ENDPOINT, else the public Hub."""

    hub_token: SecretStr = SecretStr("")
    """Token for gated and private models. Empty: HF_TOKEN, else what `hf auth login` stored."""

    hub_connection: str = ""
    """Airflow connection whose password is the Hub token of the steps that read sources (and whose
    host, if it has one, is the endpoint). Empty: the token of the environment."""

    source_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a source may take to accept a connection or to send its next bytes."""

    source_attempts: int = Field(default=6, ge=1)
    """How often a request to a source is made before its failure counts. Waits between them double
    from half a second to 15 s, so that six bridge an outage of 15 s; Airflow's retries come on
    top."""

    refresh_concurrency: int = Field(default=16, ge=1, le=128)
    """Sources that `trainyard refresh` asks at the same time."""

    kubeconfig: Path | None = None
    """Kubeconfig of the clusters that environments name. Empty: KUBECONFIG, `~/.kube/config`, or
    the cluster that we run in."""

    kube_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds that a request to a cluster's API may take."""

    requested_by: str = ""
    """Who asked for the work, for provenance; the DAGs set it to the user of the run."""

    dag_run: str = ""
    """The Airflow run the work belongs to, for provenance; the DAGs set it."""

    image: str = ""
    """Container image that this process runs in, best with its digest (`name@sha256:…`), for
    provenance. Nothing inside a container knows it: whoever starts the container sets it. Empty:
    no image."""

    @property
    def store_root(self) -> Path:
        """The folder behind `store`, where it is one."""
        return Path(self.store) if self.store else self.home / "store"

    @property
    def store_name(self) -> str:
        """`store` as another process can read it, whatever folder that one runs in."""
        return self.store if "://" in self.store else str(self.store_root.resolve())

    @property
    def work_root(self) -> Path:
        """The folder behind `work`."""
        return self.work or self.home / "work"

    @property
    def trusted_keys_file(self) -> Path:
        """The file behind `trusted_keys`."""
        return self.trusted_keys or self.home / "keys" / "trusted-keys.json"

    @property
    def serving_interpreter(self) -> Path:
        """The interpreter behind `serve_python`."""
        if self.serve_python is not None:
            return self.serve_python
        beside = self.home.parent / ".venv-serve" / "bin" / "python"
        return beside if beside.exists() else Path(sys.executable)


@cache
def get_settings() -> Settings:
    """Return the settings of this process, read once from the environment."""
    return Settings()
