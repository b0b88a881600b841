protos:
	python -m grpc_tools.protoc -I protos --python_out=/tmp --pyi_out=/tmp protos/fedark/v1/*.proto
