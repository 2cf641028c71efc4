"""Extract Inception's features with torch-fidelity, in an environment that has it.

    python evaluate_tools.py FOLDER WEIGHTS BATCH THREADS

Prints the seconds of the second of two runs, so that loading and first use do not count.
"""

import sys
import time

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import extract_featuresdict_from_input_id

folder, weights, batch, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
seconds = 0.0
for _ in range(2):
    began = time.monotonic()
    extract_featuresdict_from_input_id(
        1, extractor, input1=folder, cuda=False, batch_size=batch, verbose=False, samples_find_deep=False
    )
    seconds = time.monotonic() - began
print(seconds)
