"""Networks as Caffe writes them: the authors' released Model B, from prototxt and caffemodel to a model file."""
