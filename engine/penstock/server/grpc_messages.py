"""Messages of the Open Inference Protocol over gRPC (control path): a table, and the classes built from it at import.

Names, numbers and types are the protocol's: package `inference` as Triton and KServe speak it, and `grpc.health.v1`.
What must stay true: the classes live in a descriptor pool of their own, so that a process may also import a client's
generated modules, which put the same names into protobuf's default pool.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["HEALTH", "INFERENCE", "SERVICES", "health", "oip"]

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

# One message per line: `Name: field number type, ...`. A type is a scalar, an enum (`!Name`), or a message. `[type]` is
# repeated, `{type}` a map from string, `field/choice` a member of the oneof `choice`. A dot nests the message.
_OIP = """
ServerLiveRequest:
ServerLiveResponse: live 1 bool
ServerReadyRequest:
ServerReadyResponse: ready 1 bool
ModelReadyRequest: name 1 string, version 2 string
ModelReadyResponse: ready 1 bool
ServerMetadataRequest:
ServerMetadataResponse: name 1 string, version 2 string, extensions 3 [string]
ModelMetadataRequest: name 1 string, version 2 string
ModelMetadataResponse: name 1 string, versions 2 [string], platform 3 string, inputs 4 [.TensorMetadata], outputs 5 [.TensorMetadata]
ModelMetadataResponse.TensorMetadata: name 1 string, datatype 2 string, shape 3 [int64]

InferParameter: bool_param/parameter_choice 1 bool, int64_param/parameter_choice 2 int64, string_param/parameter_choice 3 string, double_param/parameter_choice 4 double, uint64_param/parameter_choice 5 uint64
InferTensorContents: bool_contents 1 [bool], int_contents 2 [int32], int64_contents 3 [int64], uint_contents 4 [uint32], uint64_contents 5 [uint64], fp32_contents 6 [float], fp64_contents 7 [double], bytes_contents 8 [bytes]
ModelInferRequest: model_name 1 string, model_version 2 string, id 3 string, parameters 4 {InferParameter}, inputs 5 [.InferInputTensor], outputs 6 [.InferRequestedOutputTensor], raw_input_contents 7 [bytes]
ModelInferRequest.InferInputTensor: name 1 string, datatype 2 string, shape 3 [int64], parameters 4 {InferParameter}, contents 5 InferTensorContents
ModelInferRequest.InferRequestedOutputTensor: name 1 string, parameters 2 {InferParameter}
ModelInferResponse: model_name 1 string, model_version 2 string, id 3 string, parameters 4 {InferParameter}, outputs 5 [.InferOutputTensor], raw_output_contents 6 [bytes]
ModelInferResponse.InferOutputTensor: name 1 string, datatype 2 string, shape 3 [int64], parameters 4 {InferParameter}, contents 5 InferTensorContents
ModelStreamInferResponse: error_message 1 string, infer_response 2 ModelInferResponse

ModelConfigRequest: name 1 string, version 2 string
ModelConfigResponse: config 1 ModelConfig
ModelInput: name 1 string, data_type 2 !DataType, dims 4 [int64], optional 8 bool
ModelOutput: name 1 string, data_type 2 !DataType, dims 3 [int64]
ModelVersionPolicy: latest/policy_choice 1 .Latest, all/policy_choice 2 .All, specific/policy_choice 3 .Specific
ModelVersionPolicy.Latest: num_versions 1 uint32
ModelVersionPolicy.All:
ModelVersionPolicy.Specific: versions 1 [int64]
ModelInstanceGroup: name 1 string, count 2 int32, kind 4 !.Kind
ModelParameter: string_value 1 string
ModelQueuePolicy: timeout_action 1 !.TimeoutAction, default_timeout_microseconds 2 uint64, allow_timeout_override 3 bool, max_queue_size 4 uint32
ModelDynamicBatching: preferred_batch_size 1 [int32], max_queue_delay_microseconds 2 uint64, preserve_ordering 3 bool, priority_levels 4 uint64, default_priority_level 5 uint64, default_queue_policy 6 ModelQueuePolicy
ModelConfig: name 1 string, platform 2 string, version_policy 3 ModelVersionPolicy, max_batch_size 4 int32, input 5 [ModelInput], output 6 [ModelOutput], instance_group 7 [ModelInstanceGroup], default_model_filename 8 string, dynamic_batching/scheduling_choice 11 ModelDynamicBatching, parameters 14 {ModelParameter}, backend 17 string

ModelStatisticsRequest: name 1 string, version 2 string
ModelStatisticsResponse: model_stats 1 [ModelStatistics]
StatisticDuration: count 1 uint64, ns 2 uint64
InferStatistics: success 1 StatisticDuration, fail 2 StatisticDuration, queue 3 StatisticDuration, compute_input 4 StatisticDuration, compute_infer 5 StatisticDuration, compute_output 6 StatisticDuration, cache_hit 7 StatisticDuration, cache_miss 8 StatisticDuration
InferResponseStatistics: compute_infer 1 StatisticDuration, compute_output 2 StatisticDuration, success 3 StatisticDuration, fail 4 StatisticDuration, empty_response 5 StatisticDuration, cancel 6 StatisticDuration
InferBatchStatistics: batch_size 1 uint64, compute_input 2 StatisticDuration, compute_infer 3 StatisticDuration, compute_output 4 StatisticDuration
MemoryUsage: type 1 string, id 2 int64, byte_size 3 uint64
ModelStatistics: name 1 string, version 2 string, last_inference 3 uint64, inference_count 4 uint64, execution_count 5 uint64, inference_stats 6 InferStatistics, batch_stats 7 [InferBatchStatistics], memory_usage 8 [MemoryUsage], response_stats 9 {InferResponseStatistics}

ModelRepositoryParameter: bool_param/parameter_choice 1 bool, int64_param/parameter_choice 2 int64, string_param/parameter_choice 3 string, bytes_param/parameter_choice 4 bytes
RepositoryIndexRequest: repository_name 1 string, ready 2 bool
RepositoryIndexResponse: models 1 [.ModelIndex]
RepositoryIndexResponse.ModelIndex: name 1 string, version 2 string, state 3 string, reason 4 string
RepositoryModelLoadRequest: repository_name 1 string, model_name 2 string, parameters 3 {ModelRepositoryParameter}
RepositoryModelLoadResponse:
RepositoryModelUnloadRequest: repository_name 1 string, model_name 2 string, parameters 3 {ModelRepositoryParameter}
RepositoryModelUnloadResponse:

SystemSharedMemoryStatusRequest: name 1 string
SystemSharedMemoryStatusResponse: regions 1 {.RegionStatus}
SystemSharedMemoryStatusResponse.RegionStatus: name 1 string, key 2 string, offset 3 uint64, byte_size 4 uint64
SystemSharedMemoryRegisterRequest: name 1 string, key 2 string, offset 3 uint64, byte_size 4 uint64
SystemSharedMemoryRegisterResponse:
SystemSharedMemoryUnregisterRequest: name 1 string
SystemSharedMemoryUnregisterResponse:
CudaSharedMemoryStatusRequest: name 1 string
CudaSharedMemoryStatusResponse: regions 1 {.RegionStatus}
CudaSharedMemoryStatusResponse.RegionStatus: name 1 string, device_id 2 uint64, byte_size 3 uint64
CudaSharedMemoryRegisterRequest: name 1 string, raw_handle 2 bytes, device_id 3 int64, byte_size 4 uint64
CudaSharedMemoryRegisterResponse:
CudaSharedMemoryUnregisterRequest: name 1 string
CudaSharedMemoryUnregisterResponse:

TraceSettingRequest: settings 1 {.SettingValue}, model_name 2 string
TraceSettingRequest.SettingValue: value 1 [string]
TraceSettingResponse: settings 1 {.SettingValue}
TraceSettingResponse.SettingValue: value 1 [string]
LogSettingsRequest: settings 1 {.SettingValue}
LogSettingsRequest.SettingValue: bool_param/parameter_choice 1 bool, uint32_param/parameter_choice 2 uint32, string_param/parameter_choice 3 string
LogSettingsResponse: settings 1 {.SettingValue}
LogSettingsResponse.SettingValue: bool_param/parameter_choice 1 bool, uint32_param/parameter_choice 2 uint32, string_param/parameter_choice 3 string
"""  # noqa: E501

_OIP_ENUMS = {
    "DataType": "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16",
    "ModelInstanceGroup.Kind": "AUTO GPU CPU MODEL",
    "ModelQueuePolicy.TimeoutAction": "REJECT DELAY",
}
_PREFIX = {"DataType": "TYPE_", "Kind": "KIND_"}

_HEALTH = """
HealthCheckRequest: service 1 string
HealthCheckResponse: status 1 !.ServingStatus
"""
_HEALTH_ENUMS = {"HealthCheckResponse.ServingStatus": "UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN"}

# Methods: request and answer are <method>Request and <method>Response unless said otherwise.
SERVICES: dict[str, dict[str, tuple[str, str]]] = {
    INFERENCE: {
        name: (f"{name}Request", f"{name}Response")
        for name in (
            *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
            *("ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
            *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
            *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
            *("TraceSetting", "LogSettings"),
        )
    }
    | {"ModelStreamInfer": ("ModelInferRequest", "ModelStreamInferResponse")},
    HEALTH: {"Check": ("HealthCheckRequest", "HealthCheckResponse")},
}


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _message_at(file: Any, path: str) -> Any:
    found = file
    for depth, part in enumerate(path.split(".")):
        children = found.nested_type if depth else found.message_type
        found = next((child for child in children if child.name == part), None) or children.add(name=part)
    return found


def _file(package: str, messages: str, enums: dict[str, str]) -> Any:
    """The descriptor of one proto3 file from a table."""
    file = descriptor_pb2.FileDescriptorProto(name=f"penstock/{package}.proto", package=package, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def typed(field: Any, kind: str, owner: str) -> None:
        name = kind.lstrip("!")
        if kind.startswith("!") or name[:1] == "." or name[:1].isupper():
            field.type = kinds.TYPE_ENUM if kind.startswith("!") else kinds.TYPE_MESSAGE
            field.type_name = f".{package}.{owner}{name}" if name.startswith(".") else f".{package}.{name}"
        else:
            field.type = getattr(kinds, f"TYPE_{name.upper()}")

    for line in filter(None, messages.splitlines()):
        path, _, fields = line.partition(":")
        message = _message_at(file, path)
        choices: list[str] = []
        for text in filter(None, fields.split(",")):
            name, number, kind = text.split()
            name, _, choice = name.partition("/")
            field = message.field.add(name=name, number=int(number), label=kinds.LABEL_OPTIONAL)
            if choice:
                if choice not in choices:
                    choices.append(choice)
                    message.oneof_decl.add(name=choice)
                field.oneof_index = choices.index(choice)
            if kind[0] in "[{":
                field.label = kinds.LABEL_REPEATED
            if kind[0] == "{":
                entry = message.nested_type.add(name=f"{_camel(name)}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
                value = entry.field.add(name="value", number=2, label=kinds.LABEL_OPTIONAL)
                typed(value, kind[1:-1], path)
                field.type = kinds.TYPE_MESSAGE
                field.type_name = f".{package}.{path}.{entry.name}"
            else:
                typed(field, kind.strip("[]"), path)
    for path, values in enums.items():
        owner, _, name = path.rpartition(".")
        enum = (_message_at(file, owner) if owner else file).enum_type.add(name=name)
        for position, text in enumerate(values.split()):
            enum.value.add(name=_PREFIX.get(name, "") + text, number=position)
    return file


def _classes(package: str, messages: str, enums: dict[str, str]) -> Any:
    """A namespace with the class of every message at the top of the file."""
    pool = descriptor_pool.DescriptorPool()
    file = pool.AddSerializedFile(_file(package, messages, enums).SerializeToString())
    if file is None:  # the Python implementation returns nothing
        file = pool.FindFileByName(f"penstock/{package}.proto")
    return SimpleNamespace(
        **{name: message_factory.GetMessageClass(kind) for name, kind in file.message_types_by_name.items()},
        **dict(file.enum_types_by_name.items()),
        DESCRIPTOR=file,
    )


oip: Any = _classes("inference", _OIP, _OIP_ENUMS)
health: Any = _classes("grpc.health.v1", _HEALTH, _HEALTH_ENUMS)
