"""A scan under a policy, against a server that enforces it: ``python -m tests.iam_scan PICTURES PLAN POLICY``.

A process of its own: the server counts every request after the set-up, and credentials are the user's.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

from pipeline.labels.demo import serve_s3
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import s3_client
from tests.conftest import upload


def main(pictures: str, plan: str, policy: str) -> None:
    with serve_s3() as endpoint:
        admin = s3_client(endpoint)
        for bucket in ("output-bucket", "other-bucket"):
            admin.create_bucket(Bucket=bucket)
        upload(Path(pictures), endpoint, "source-bucket", limit=60)
        become_worker(
            endpoint, policy.replace("SOURCE-BUCKET", "source-bucket").replace("OUTPUT-BUCKET", "output-bucket")
        )
        record = run_scan(
            ScanConfig(
                source="s3://source-bucket/all/", output="s3://output-bucket/out", endpoint_url=endpoint, plan=plan
            )
        )
        worker = s3_client(endpoint)
        found = {
            "listed": record["counts"]["listed"],
            "put": refusal(lambda: worker.put_object(Bucket="source-bucket", Key="all/x", Body=b"")),
            "delete": refusal(lambda: worker.delete_object(Bucket="source-bucket", Key="all/0000000.jpg")),
            "other bucket": refusal(lambda: worker.list_objects_v2(Bucket="other-bucket")),
        }
    print(json.dumps(found))


def become_worker(endpoint: str, policy: str) -> None:
    """From here on the server checks every signature and right, and this process has the worker's alone."""
    iam = boto3.client("iam", endpoint_url=endpoint, region_name="us-east-1")
    iam.create_user(UserName="worker")
    iam.put_user_policy(UserName="worker", PolicyName="scan", PolicyDocument=policy)
    key = iam.create_access_key(UserName="worker")["AccessKey"]
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=b"0", headers=headers))
    os.environ.update(AWS_ACCESS_KEY_ID=key["AccessKeyId"], AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"])
    boto3.DEFAULT_SESSION = None
    s3_client.cache_clear()


def refusal(request: Callable[[], object]) -> str:
    try:
        request()
    except ClientError as error:
        return error.response["Error"]["Code"]
    return "allowed"


if __name__ == "__main__":
    main(*sys.argv[1:])
