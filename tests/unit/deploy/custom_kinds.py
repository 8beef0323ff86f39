"""The rules of custom kinds, as their CRDs have them, for the fields that `k8s/` uses.

Written from the CRDs of Gateway API 1.6, Envoy Gateway 1.9, Karpenter 1.14 (AWS), KEDA 2.20 and the
Prometheus Operator 0.93, as of August 2026. A field that is not here is refused, so whoever uses a
new one looks it up and adds it.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
GO_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
KARPENTER_DURATION: Schema = {"type": "string", "pattern": r"^(([0-9]+(s|m|h))+|Never)$"}
PROMETHEUS_DURATION: Schema = {"type": "string", "pattern": r"^[0-9]+(ms|s|m|h|d)$"}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def number(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def many(each: Schema, *, least: int = 0, most: int | None = None) -> Schema:
    return {"type": "array", "items": each, "minItems": least} | (
        {} if most is None else {"maxItems": most}
    )


def fields(*required: str, **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


REFERENCE = fields("group", "kind", "name", group=TEXT, kind=TEXT, name=TEXT)

GATEWAY_CLASS = fields("controllerName", controllerName={"type": "string", "pattern": r".+/.+"})

GATEWAY = fields(
    "gatewayClassName",
    "listeners",
    gatewayClassName=TEXT,
    infrastructure=fields(parametersRef=REFERENCE),
    listeners=many(
        fields(
            "name",
            "port",
            "protocol",
            name=TEXT,
            hostname={
                "type": "string",
                "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\..+)*$",
            },
            port=number(1, 65535),
            protocol=one_of("HTTP", "HTTPS", "TLS", "TCP", "UDP"),
            allowedRoutes=fields(
                namespaces=fields(**{"from": one_of("All", "Selector", "Same")})  # type: ignore[arg-type]
            ),
        ),
        least=1,
        most=64,
    ),
)

ENVOY_PROXY = fields(
    telemetry=fields(metrics=fields(enablePerEndpointStats=FLAG)),
    shutdown=fields(drainTimeout=GO_DURATION, minDrainDuration=GO_DURATION),
    provider=fields(
        "type",
        type=one_of("Kubernetes", "Host"),
        kubernetes=fields(
            envoyDeployment=fields(
                replicas=number(1), pod=fields(topologySpreadConstraints={"type": "array"})
            ),
            envoyService=fields(
                type=one_of("ClusterIP", "LoadBalancer", "NodePort"),
                loadBalancerClass=TEXT,
                annotations=TEXTS,
            ),
        ),
    ),
)

CLIENT_TRAFFIC_POLICY = fields(
    "targetRefs",
    targetRefs=many(REFERENCE, least=1, most=16),
    timeout=fields(http=fields(streamIdleTimeout=GO_DURATION)),
    tcpKeepalive=fields(idleTime=GO_DURATION, interval=GO_DURATION, probes=number(1)),
)

EC2_NODE_CLASS = fields(
    "amiSelectorTerms",
    "subnetSelectorTerms",
    "securityGroupSelectorTerms",
    role=TEXT,
    amiSelectorTerms=many(
        fields(
            # A family and a date, `latest` being allowed by Karpenter and not by us.
            alias={"type": "string", "pattern": r"^(al2023|bottlerocket)@v\d[\w.]*$"}
        ),
        least=1,
        # An alias stands alone.
        most=1,
    ),
    subnetSelectorTerms=many(fields("tags", tags=TEXTS), least=1, most=30),
    securityGroupSelectorTerms=many(fields("tags", tags=TEXTS), least=1, most=30),
    capacityReservationSelectorTerms=many(fields("tags", tags=TEXTS), most=30),
    metadataOptions=fields(
        httpEndpoint=one_of("enabled", "disabled"),
        httpTokens=one_of("required", "optional"),
        httpPutResponseHopLimit=number(1, 64),
    ),
    instanceStorePolicy=one_of("RAID0"),
    userData=TEXT,
    blockDeviceMappings=many(
        fields(
            deviceName=TEXT,
            rootVolume=FLAG,
            ebs=fields(
                volumeType=one_of("standard", "io1", "io2", "gp2", "sc1", "st1", "gp3"),
                volumeSize={"type": "string", "pattern": r"^[1-9][0-9]{0,4}(Gi|G|Ti|T)$"},
                # Those of gp3.
                iops=number(3000, 80000),
                throughput=number(125, 2000),
                encrypted=FLAG,
                deleteOnTermination=FLAG,
            ),
        ),
        most=50,
    ),
)

TAINT = fields(
    "key",
    "effect",
    key=TEXT,
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)

NODE_POOL = fields(
    "template",
    template=fields(
        "spec",
        metadata=fields(labels=TEXTS, annotations=TEXTS),
        spec=fields(
            "nodeClassRef",
            "requirements",
            nodeClassRef=REFERENCE,
            taints=many(TAINT),
            requirements=many(
                {
                    **fields(
                        "key",
                        "operator",
                        key=TEXT,
                        operator=one_of(
                            "In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt", "Gte", "Lte"
                        ),
                        values=many(
                            {"type": "string", "pattern": r"^[A-Za-z0-9]([-A-Za-z0-9_.]*\w)?$"}
                        ),
                    ),
                    # Comparisons take one number.
                    "if": {"properties": {"operator": one_of("Gt", "Lt", "Gte", "Lte")}},
                    "then": {
                        "properties": {
                            "values": {
                                "minItems": 1,
                                "maxItems": 1,
                                "items": {"type": "string", "pattern": r"^\d+$"},
                            }
                        }
                    },
                },
                most=100,
            ),
            expireAfter=KARPENTER_DURATION,
            terminationGracePeriod={"type": "string", "pattern": r"^([0-9]+(s|m|h))+$"},
        ),
    ),
    limits=TEXTS,
    disruption=fields(
        "consolidateAfter",
        consolidateAfter=KARPENTER_DURATION,
        consolidationPolicy=one_of("WhenEmpty", "WhenEmptyOrUnderutilized", "Balanced"),
        budgets=many(
            fields(
                "nodes",
                nodes={"type": "string", "pattern": r"^((100|[0-9]{1,2})%|[0-9]+)$"},
                reasons=many(one_of("Underutilized", "Empty", "Drifted")),
            ),
            most=50,
        ),
    ),
)

RELABELING = fields(
    sourceLabels=many({"type": "string", "pattern": r"^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    targetLabel={"type": "string", "pattern": r"^[a-zA-Z_][a-zA-Z0-9_]*$"},
)

POD_MONITOR = fields(
    "selector",
    "podMetricsEndpoints",
    selector=fields(matchLabels=TEXTS),
    podMetricsEndpoints=many(
        fields(
            port=TEXT,
            path=TEXT,
            interval=PROMETHEUS_DURATION,
            scrapeTimeout=PROMETHEUS_DURATION,
            relabelings=many(RELABELING, least=1),
            metricRelabelings=many(RELABELING, least=1),
        ),
        least=1,
    ),
)

PROMETHEUS_RULE = fields(
    "groups",
    groups=many(
        fields(
            "name",
            name=TEXT,
            rules=many(
                fields(
                    "expr",
                    alert=TEXT,
                    expr=TEXT,
                    labels=TEXTS,
                    annotations=TEXTS,
                    **{"for": PROMETHEUS_DURATION},  # type: ignore[arg-type]
                ),
                least=1,
            ),
        ),
        least=1,
    ),
)

SCALED_OBJECT = fields(
    "scaleTargetRef",
    "triggers",
    scaleTargetRef=fields("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
    minReplicaCount=number(0),
    maxReplicaCount=number(1),
    pollingInterval=number(1),
    cooldownPeriod=number(0),
    fallback=fields(
        "failureThreshold",
        "replicas",
        failureThreshold=number(1),
        replicas=number(0),
        behavior=one_of(
            "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"
        ),
    ),
    advanced=fields(horizontalPodAutoscalerConfig=fields(behavior={"type": "object"})),
    triggers=many(
        fields(
            "type",
            "metadata",
            type=one_of("prometheus"),
            name=TEXT,
            metricType=one_of("AverageValue", "Value", "Utilization"),
            metadata=fields(
                "serverAddress",
                "query",
                "threshold",
                serverAddress={"type": "string", "pattern": r"^https?://"},
                query=TEXT,
                threshold={"type": "string", "pattern": r"^[0-9.]+$"},
                ignoreNullValues=one_of("true", "false"),
            ),
        ),
        least=1,
    ),
)

RULES: dict[tuple[str, str], Schema] = {
    ("gateway.networking.k8s.io/v1", "GatewayClass"): GATEWAY_CLASS,
    ("gateway.networking.k8s.io/v1", "Gateway"): GATEWAY,
    ("gateway.envoyproxy.io/v1alpha1", "EnvoyProxy"): ENVOY_PROXY,
    ("gateway.envoyproxy.io/v1alpha1", "ClientTrafficPolicy"): CLIENT_TRAFFIC_POLICY,
    ("karpenter.k8s.aws/v1", "EC2NodeClass"): EC2_NODE_CLASS,
    ("karpenter.sh/v1", "NodePool"): NODE_POOL,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
}
"""The rules of `spec`, by apiVersion and kind."""
