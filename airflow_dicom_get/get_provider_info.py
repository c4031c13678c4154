"""What Airflow is told about this package.

Airflow calls this in every one of its commands, and an import error here stops them all: so this
module imports nothing and is one literal.
"""


def get_provider_info() -> dict:  # type: ignore[type-arg]
    """Return the provider's description: connection types, configuration, modules."""
    return {
        "package-name": "airflow-dicom-get",
        "name": "DICOM C-GET",
        "description": "Retrieves DICOM studies from a PACS by C-GET, each with a verdict and a manifest.",
        "integrations": [
            {
                "integration-name": "DICOM",
                "external-doc-url": "https://www.dicomstandard.org/",
                "tags": ["protocol"],
            }
        ],
        "hooks": [
            {
                "integration-name": "DICOM",
                "python-modules": ["airflow_dicom_get.hooks.dicom", "airflow_dicom_get.hooks.dicom_s3"],
            }
        ],
        "operators": [{"integration-name": "DICOM", "python-modules": ["airflow_dicom_get.operators.dicom"]}],
        "sensors": [{"integration-name": "DICOM", "python-modules": ["airflow_dicom_get.sensors.dicom"]}],
        "triggers": [{"integration-name": "DICOM", "python-modules": ["airflow_dicom_get.triggers.dicom"]}],
        "extra-links": ["airflow_dicom_get.operators.links.DicomManifestLink"],
        "connection-types": [
            {
                "connection-type": "dicom",
                "hook-class-name": "airflow_dicom_get.hooks.dicom.DicomHook",
                "hook-name": "DICOM (PACS)",
                "ui-field-behaviour": {
                    "hidden-fields": ["schema"],
                    "relabeling": {
                        "host": "PACS host",
                        "port": "PACS port",
                        "login": "Called AE title",
                        "password": "TLS key passphrase",
                    },
                    "placeholders": {
                        "host": "pacs.hospital.example",
                        # Always to be filled: a connection saved without a port cannot be tested from the UI.
                        "port": "104",
                        "login": "ANY-SCP",
                    },
                },
                # No field limits its length: the form cuts what is too long, and a cut AE title is worse than a
                # refused one. The hook checks every value.
                "conn-fields": {
                    "calling_ae_title": {
                        "label": "Calling AE title",
                        "description": "Our AE title, as registered at the PACS: 1 to 16 characters.",
                        "schema": {"type": ["string", "null"], "default": "GET-SCU"},
                    },
                    "query_model": {
                        "label": "Query/Retrieve model",
                        "description": "Use PatientRoot only if the PACS does not offer StudyRoot.",
                        "schema": {
                            "type": ["string", "null"],
                            "enum": ["StudyRoot", "PatientRoot"],
                            "default": "StudyRoot",
                        },
                    },
                    "max_pdu_length": {
                        "label": "Maximum PDU length",
                        "description": "Largest PDU, in bytes, that the PACS may send; 131072 is fastest.",
                        "schema": {"type": ["integer", "null"], "default": 131072},
                    },
                    "max_associations": {
                        "label": "Associations at once",
                        "description": "Parallel associations that the PACS allows. Create a pool with as many slots.",
                        "schema": {"type": ["integer", "null"], "default": 2},
                    },
                    "bytes_per_second": {
                        "label": "Bytes per second",
                        "description": "Rate limit of all retrievals together, for example 20M. Blank: no limit.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "window": {
                        "label": "Hours for retrievals",
                        "description": "Hours in which the PACS may be used, such as 22:00-06:00. Blank: at any time.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "timezone": {
                        "label": "Time zone of the PACS",
                        "description": "For the hours above and for dates such as today, for example Europe/Berlin.",
                        "schema": {"type": ["string", "null"], "default": "UTC"},
                    },
                    "list_limit": {
                        "label": "Row counts at which lists are truncated",
                        "description": "For example 500, or 100,1000. 0: never. Blank: not known.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "use_tls": {
                        "label": "Use TLS",
                        "schema": {"type": ["boolean", "null"], "default": False},
                    },
                    "tls_ca_file": {
                        "label": "TLS: CA file",
                        "description": "PEM file on the workers. Blank: the certificates that the system trusts.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "tls_cert_file": {
                        "label": "TLS: our certificate",
                        "description": "PEM file on the workers, if the PACS asks for one.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "tls_key_file": {
                        "label": "TLS: our key",
                        "description": "PEM file on the workers; its passphrase is the field TLS key passphrase.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "tls_server_name": {
                        "label": "TLS: server name",
                        "description": "Name in the certificate of the PACS, if it differs from the host.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "tls_check_hostname": {
                        "label": "TLS: check the server name",
                        "schema": {"type": ["boolean", "null"], "default": True},
                    },
                    "tls_min_version": {
                        "label": "TLS: lowest version",
                        "schema": {"type": ["string", "null"], "enum": ["1.2", "1.3"], "default": "1.2"},
                    },
                },
            },
            {
                "connection-type": "dicom_s3",
                "hook-class-name": "airflow_dicom_get.hooks.dicom_s3.DicomS3Hook",
                "hook-name": "DICOM storage (S3)",
                "ui-field-behaviour": {
                    "hidden-fields": ["schema"],
                    "relabeling": {
                        "host": "Endpoint host (blank: AWS)",
                        # Always to be filled: a connection saved without a port cannot be tested from the UI.
                        "port": "Endpoint port (always give one)",
                        "login": "Access key",
                        "password": "Secret key",
                    },
                    "placeholders": {"host": "minio.hospital.example", "port": "443"},
                },
                "conn-fields": {
                    "scheme": {
                        "label": "Scheme",
                        "description": "Protocol of the endpoint; http is not encrypted.",
                        "schema": {"type": ["string", "null"], "enum": ["https", "http"], "default": "https"},
                    },
                    "region": {
                        "label": "Region",
                        "schema": {"type": ["string", "null"], "default": "us-east-1"},
                    },
                    "bucket": {
                        "label": "Bucket for the test",
                        "description": "The Test button writes a small object here. Tasks name their own bucket.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "path_style": {
                        "label": "Bucket in the URL",
                        "description": "In the path, or as a virtual host; auto: in the path if a host is given.",
                        "schema": {
                            "type": ["string", "null"],
                            "enum": ["auto", "path", "virtual"],
                            "default": "auto",
                        },
                    },
                    "session_token": {
                        "label": "Session token",
                        "description": "Only for temporary credentials.",
                        "schema": {"type": ["string", "null"], "format": "password"},
                    },
                    "profile": {
                        "label": "Profile",
                        "description": "Profile of the AWS configuration on the workers, instead of keys.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "ca_file": {
                        "label": "CA file",
                        "description": "PEM file on the workers. Blank: the certificates that boto3 trusts.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "sse": {
                        "label": "Encryption at rest",
                        "schema": {"type": ["string", "null"], "enum": ["AES256", "aws:kms"]},
                    },
                    "kms_key_id": {
                        "label": "Key of aws:kms",
                        "description": "Blank: the key of the account.",
                        "schema": {"type": ["string", "null"]},
                    },
                    "storage_class": {
                        "label": "Storage class",
                        "schema": {"type": ["string", "null"]},
                    },
                    "max_concurrency": {
                        "label": "Parallel parts of 8 MiB",
                        "description": "Bounds memory and requests of a task.",
                        "schema": {"type": ["integer", "null"], "default": 8},
                    },
                },
            },
        ],
        "config": {
            "dicom_get": {
                "description": "Retrieval of DICOM studies by airflow-dicom-get.",
                "options": {
                    "manifest_root": {
                        "description": (
                            "Where the manifests of transfers to another DICOM node are written: an absolute path or "
                            "an s3:// address. Empty: nowhere. Retrievals to a folder or a bucket write them there. "
                            "Where it is set, the page opens manifests below it alone, and none in a bucket."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/data/dicom/manifests",
                        "default": "",
                    },
                    "allowed_destinations": {
                        "description": (
                            "Where tasks may write to, and read the objects of a manifest from: patterns of paths, "
                            "s3:// and dicom:// addresses, one a line, with ``*`` for any characters. Empty: anywhere."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/data/dicom/*",
                        "default": "",
                    },
                    "manifest_xcom_max_bytes": {
                        "description": (
                            "Largest manifest, in bytes as XCom stores it, that a task returns as a DataFrame: about "
                            "33,000 rows by default. Of a larger one a reference to its file is returned where "
                            "``manifest_xcom`` is ``auto``, and where it is ``full``, the task fails."
                        ),
                        "version_added": "0.1.0",
                        "type": "integer",
                        "example": None,
                        "default": "10485760",
                    },
                    "progress_interval": {
                        "description": (
                            "Seconds between two lines of progress in the task log, and between two writes to the "
                            "task state store; at least 5 for the latter."
                        ),
                        "version_added": "0.1.0",
                        "type": "integer",
                        "example": None,
                        "default": "5",
                    },
                    "require_pool": {
                        "description": (
                            "Refuse retrievals that run in ``default_pool``, where nothing limits the number "
                            "of associations to what the PACS allows."
                        ),
                        "version_added": "0.1.0",
                        "type": "boolean",
                        "example": None,
                        "default": "False",
                    },
                    "page_days": {
                        "description": "Days that the page of retrievals covers unless other dates are selected.",
                        "version_added": "0.1.0",
                        "type": "integer",
                        "example": None,
                        "default": "30",
                    },
                },
            }
        },
    }
