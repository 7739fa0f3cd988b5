"""JSON schemas of the fields that our JobSet and our SkyPilot task use; any other field is an error until it is added here.

JOBSET follows the custom resource definition `jobset.x-k8s.io/v1alpha2` of kubernetes-sigs/jobset at 08dfbdf (after 0.13),
SKYPILOT `sky.utils.schemas` of SkyPilot 0.14.1. `check_in_full.py` validates against the originals.
"""

STRING, BOOL = {"type": "string"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$"}


def fields(required: str = "", **properties) -> dict:
    """Returns the schema of an object with these fields and no others; `required` names the necessary ones, by spaces."""
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False
    }  # fmt: skip


def one_of(*values) -> dict:
    """Returns the schema of a value that is one of these."""
    return {"enum": list(values)}


def items(schema: dict) -> dict:
    """Returns the schema of a list that is not empty."""
    return {"type": "array", "items": schema, "minItems": 1}


STRINGS = {"type": "object", "additionalProperties": STRING}

_CONTAINER = fields(
    "name image",
    name=NAME,
    image={"type": "string", "pattern": "^[^\\s$]+$"},
    command=items(STRING),
    env=items(fields("name", name=STRING, valueFrom=fields("fieldRef", fieldRef=fields("fieldPath", fieldPath=STRING)))),
    ports=items(fields("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=fields(
        requests={"type": "object", "additionalProperties": COUNT},
        limits={"type": "object", "additionalProperties": COUNT},
    ),
    volumeMounts=items(fields("name mountPath", name=NAME, mountPath=STRING)),
)
_POD = fields(
    "containers",
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    shareProcessNamespace=BOOL,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=STRINGS,
    tolerations=items(fields("", key=STRING, operator=one_of("Exists", "Equal"), value=STRING)),
    containers=items(_CONTAINER),
    volumes=items(fields("name", name=NAME, persistentVolumeClaim=fields("claimName", claimName=NAME))),
)
_FAILED_POD = fields(
    "action",
    action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
    onPodConditions=items(fields("type", type=STRING, status=one_of("True", "False", "Unknown"))),
    onExitCodes=fields(
        "operator values", containerName=NAME, operator=one_of("In", "NotIn"), values=items({"type": "integer"})
    ),
)
_JOB = fields(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=fields("rules", rules=items(_FAILED_POD)),
    template=fields("spec", spec=_POD),
)
_FAILED_JOB = fields(
    "action name",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one_of(
        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"
    ),
    onJobFailureReasons=items(
        one_of("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
    ),
    onJobFailureMessagePatterns=items(STRING),
)
JOBSET = fields(
    "apiVersion kind metadata spec",
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=fields("name", name=NAME, annotations=STRINGS),
    spec=fields(
        "replicatedJobs",
        failurePolicy=fields("", maxRestarts=COUNT, rules=items(_FAILED_JOB)),
        replicatedJobs=items(
            fields("name template", name=NAME, replicas=COUNT, template=fields("spec", spec=_JOB))
        ),
    ),
)  # fmt: skip

_STATUS = {"type": "integer", "minimum": 0, "maximum": 255}
SKYPILOT = fields(
    "",
    name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    resources=fields(
        "",
        accelerators={"type": "string", "pattern": "^[A-Za-z0-9-]+:[0-9]+$"},
        use_spot=BOOL,
        job_recovery=fields("", max_restarts_on_errors=COUNT, recover_on_exit_codes=items(_STATUS)),
    ),
    envs={
        "type": "object",
        "patternProperties": {"^[a-zA-Z_][a-zA-Z0-9_]*$": {"type": ["string", "null"]}},
        "additionalProperties": False,
    },
    file_mounts={
        "type": "object",
        "additionalProperties": fields("source", source=STRING, mode=one_of("MOUNT", "COPY", "MOUNT_CACHED")),
    },
    run=STRING,
)
