"""The format of Caffe's files, as far as Model B needs it: messages for the protobuf library, without generated code.

Names, numbers and defaults are the same as in `caffe.proto`. Everything else in it is skipped when a file is read.

Note [Weights as bytes]
`caffe.proto` declares a blob's `data` and `double_data` as packed repeated floats and doubles. On the wire these are a
length and little-endian numbers, exactly what a field of bytes is. Declared as bytes they become arrays without a
Python object for each of 171 million weights. A file with floats that are not packed then has no data for us, which
`reading` reports. A text file cannot contain a blob's data, and no prototxt does.
"""

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SCHEMA = """
message BlobShape { repeated int64 dim = 1 [packed = true] }
message BlobProto {
  optional int32 num = 1; optional int32 channels = 2; optional int32 height = 3; optional int32 width = 4
  optional bytes data = 5; optional BlobShape shape = 7; optional bytes double_data = 8
}
message NetParameter {
  optional string name = 1; repeated V1LayerParameter layers = 2; repeated LayerParameter layer = 100
  repeated string input = 3; repeated int32 input_dim = 4; repeated BlobShape input_shape = 8
}
message NetStateRule { optional Phase phase = 1 }
message LayerParameter {
  optional string name = 1; optional string type = 2; repeated string bottom = 3; repeated string top = 4
  repeated BlobProto blobs = 7; repeated NetStateRule include = 8; repeated NetStateRule exclude = 9
  optional TransformationParameter transform_param = 100; optional ConcatParameter concat_param = 104
  optional ConvolutionParameter convolution_param = 106; optional ImageDataParameter image_data_param = 115
  optional InnerProductParameter inner_product_param = 117; optional PoolingParameter pooling_param = 121
  optional ReLUParameter relu_param = 123; optional SoftmaxParameter softmax_param = 125
  optional DropoutParameter dropout_param = 108; optional FlattenParameter flatten_param = 135
  optional InputParameter input_param = 143
}
message V1LayerParameter {
  repeated string bottom = 2; repeated string top = 3; optional string name = 4; optional LayerType type = 5
  repeated BlobProto blobs = 6; repeated NetStateRule include = 32; repeated NetStateRule exclude = 33
  optional TransformationParameter transform_param = 36; optional ConcatParameter concat_param = 9
  optional ConvolutionParameter convolution_param = 10; optional ImageDataParameter image_data_param = 15
  optional InnerProductParameter inner_product_param = 17; optional PoolingParameter pooling_param = 19
  optional ReLUParameter relu_param = 30; optional SoftmaxParameter softmax_param = 39
  optional DropoutParameter dropout_param = 12
}
message TransformationParameter {
  optional float scale = 1 [default = 1]; optional uint32 crop_size = 3; optional string mean_file = 4
  repeated float mean_value = 5
}
message ImageDataParameter { optional uint32 new_height = 9; optional uint32 new_width = 10 }
message InputParameter { repeated BlobShape shape = 1 }
message ConcatParameter { optional int32 axis = 2 [default = 1]; optional uint32 concat_dim = 1 [default = 1] }
message ConvolutionParameter {
  optional uint32 num_output = 1; optional bool bias_term = 2 [default = true]
  optional uint32 group = 5 [default = 1]; optional int32 axis = 16 [default = 1]
  repeated uint32 kernel_size = 4; optional uint32 kernel_h = 11; optional uint32 kernel_w = 12
  repeated uint32 stride = 6; optional uint32 stride_h = 13; optional uint32 stride_w = 14
  repeated uint32 pad = 3; optional uint32 pad_h = 9; optional uint32 pad_w = 10; repeated uint32 dilation = 18
}
message DropoutParameter { optional float dropout_ratio = 1 [default = 0.5] }
message FlattenParameter { optional int32 axis = 1 [default = 1]; optional int32 end_axis = 2 [default = -1] }
message InnerProductParameter {
  optional uint32 num_output = 1; optional bool bias_term = 2 [default = true]
  optional int32 axis = 5 [default = 1]; optional bool transpose = 6
}
message PoolingParameter {
  optional PoolMethod pool = 1; optional bool global_pooling = 12; optional RoundMode round_mode = 13
  optional uint32 kernel_size = 2; optional uint32 kernel_h = 5; optional uint32 kernel_w = 6
  optional uint32 stride = 3; optional uint32 stride_h = 7; optional uint32 stride_w = 8
  optional uint32 pad = 4; optional uint32 pad_h = 9; optional uint32 pad_w = 10
}
message ReLUParameter { optional float negative_slope = 1 }
message SoftmaxParameter { optional int32 axis = 2 [default = 1] }
"""
ENUMS = {  # names of the values, numbered from 0
    "Phase": "TRAIN TEST",
    "PoolMethod": "MAX AVE STOCHASTIC",
    "RoundMode": "CEIL FLOOR",
    "LayerType": "NONE ACCURACY BNLL CONCAT CONVOLUTION DATA DROPOUT EUCLIDEAN_LOSS FLATTEN HDF5_DATA HDF5_OUTPUT "
    "IM2COL IMAGE_DATA INFOGAIN_LOSS INNER_PRODUCT LRN MULTINOMIAL_LOGISTIC_LOSS POOLING RELU SIGMOID SOFTMAX "
    "SOFTMAX_LOSS SPLIT TANH WINDOW_DATA ELTWISE POWER SIGMOID_CROSS_ENTROPY_LOSS HINGE_LOSS MEMORY_DATA ARGMAX "
    "THRESHOLD DUMMY_DATA SLICE MVN ABSVAL SILENCE CONTRASTIVE_LOSS EXP DECONVOLUTION",
}
PACKAGE = "caffe"


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package=PACKAGE, syntax="proto2")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, body in re.findall(r"message (\w+) \{(.*?)\}", SCHEMA, re.DOTALL):
        message = file.message_type.add(name=name)
        for label, kind, field, number, option, value in re.findall(
            r"(optional|repeated) (\w+) (\w+) = (\d+)(?: \[(default|packed) = (\S+)\])?", body
        ):
            entry = message.field.add(name=field, number=int(number))
            entry.label = kinds.LABEL_REPEATED if label == "repeated" else kinds.LABEL_OPTIONAL
            if kind.islower() or kind[-1].isdigit():
                entry.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            else:
                entry.type_name = f".{PACKAGE}.{kind}"
                entry.type = kinds.TYPE_ENUM if kind in ENUMS else kinds.TYPE_MESSAGE
            if option == "default":
                entry.default_value = value
            elif option == "packed":
                entry.options.packed = True
    return file


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))


_POOL = descriptor_pool.DescriptorPool()  # our own: another package may have registered the real caffe.proto
_POOL.Add(_file())
NetParameter: Any = _message("NetParameter")
PHASE_TEST = ENUMS["Phase"].split().index("TEST")
V1_TYPES = ENUMS["LayerType"].split()
