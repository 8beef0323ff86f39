#!/usr/bin/env bash
# What must be there before the services of docker-compose.yaml start; doing it again changes nothing.
set -euo pipefail
umask 077

mkdir -p /srv/home/airflow /srv/home/run

airflow db migrate

# The one user of Airflow's simple auth manager.
python3 - <<'PYTHON'
import json
import os
from pathlib import Path

path = Path(os.environ["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
path.write_text(json.dumps({"admin": os.environ["AIRFLOW_ADMIN_PASSWORD"]}))
PYTHON

# Pools share scarce devices out; they count deferred tasks, whose work goes on.
python3 -m trainyard pools >/tmp/pools.json
airflow pools import /tmp/pools.json

# Whose credentials the steps get for the store.
python3 - >/tmp/connections.json <<'PYTHON'
import json
import os

connection = {
    "conn_type": "aws",
    "login": os.environ["AWS_ACCESS_KEY_ID"],
    "password": os.environ["AWS_SECRET_ACCESS_KEY"],
}
print(json.dumps({os.environ["TRAINYARD_AWS_CONNECTION"]: connection}))
PYTHON
airflow connections import --overwrite /tmp/connections.json
rm /tmp/pools.json /tmp/connections.json

# The bucket, and proof that its conditional writes hold.
python3 - <<'PYTHON'
import os
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

client = boto3.client(
    "s3",
    endpoint_url=os.environ["TRAINYARD_S3_ENDPOINT_URL"],
    region_name=os.environ["TRAINYARD_S3_REGION"],
    config=Config(s3={"addressing_style": os.environ["TRAINYARD_S3_ADDRESSING_STYLE"]}),
)
bucket = urlsplit(os.environ["TRAINYARD_STORE"]).netloc
if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
    client.create_bucket(Bucket=bucket)
PYTHON
python3 - <<'PYTHON'
import sys

from trainyard.doctor.store_checks import store_checks
from trainyard.settings import get_settings
from trainyard.store.factory import open_store

checks = list(store_checks(open_store(get_settings())))
for check in checks:
    print(f"{check.state}: {check.name}: {check.found} {check.remedy}".rstrip())
sys.exit(any(check.state == "fail" for check in checks))
PYTHON
