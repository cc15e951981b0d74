"""The numbers the paper reports, so that ours can stand beside them.

Mezentsev & Oseledets, "Exploring the Latent Capacity of LLMs for One-Step Text Generation", arXiv
2505.21189 (v1 and v2; EMNLP 2025), unless a name says Kuratov: Kuratov et al., "Cramming 1568
Tokens into a Single Vector and Back Again", arXiv 2502.13063 (ACL 2025). H_LM is in nats.
"""

from __future__ import annotations

CITATION = "Mezentsev & Oseledets, arXiv 2505.21189"

# Table 1: token accuracy, mean and standard deviation over 50 PG-19 texts, Llama-3.2-1B.
# {arrangement: {N: (mean, std)}}
TABLE_1 = {
    "e*": {1: (1.00, 0.00), 2: (0.45, 0.31), 4: (0.17, 0.18), 256: (0.01, 0.01)},
    "e* m*": {1: (1.00, 0.00), 2: (1.00, 0.00), 4: (0.12, 0.13), 256: (0.01, 0.01)},
    "(e m)*": {1: (1.00, 0.00), 2: (1.00, 0.00), 4: (1.00, 0.00), 256: (0.17, 0.34)},
    "e m*+1": {1: (1.00, 0.00), 2: (1.00, 0.00), 4: (1.00, 0.00), 256: (0.97, 0.15)},
    "e m*": {1: (1.00, 0.00), 2: (1.00, 0.00), 4: (1.00, 0.00), 256: (0.99, 0.10)},
}

# Table 2: token accuracy of 256 PG-19 texts at N = 256 with a vector shared by groups of texts;
# "max" is the best of 10 seeds for each text, "avg" the mean. {(shared, aggregate): {group: …}}
TABLE_2 = {
    ("e", "max"): {1: (1.00, 0.00), 16: (0.99, 0.01), 256: (0.99, 0.02)},
    ("e", "avg"): {1: (0.98, 0.08), 16: (0.90, 0.17), 256: (0.86, 0.20)},
    ("m", "max"): {1: (1.00, 0.00), 16: (1.00, 0.00), 256: (1.00, 0.01)},
    ("m", "avg"): {1: (0.98, 0.07), 16: (0.86, 0.19), 256: (0.83, 0.18)},
}

MODELS = ("P-160M", "P-410M", "P-1.4B", "L-3.2-1B", "L-3.2-3B", "L-3.1-8B")

# Table 3, the longest N reconstructed with an accuracy of at least 0.99: C_tokens and H_LM.
# {(source, m shared): a value for each of MODELS}
TABLE_3_TOKENS = {
    ("Random", False): (90, 92, 90, 256, 362, 512),
    ("Random", True): (45, 22, 45, 181, 256, 256),
    ("Fanfics", False): (128, 128, 131, 362, 512, 724),
    ("Fanfics", True): (45, 45, 45, 181, 288, 362),
    ("PG-19", False): (128, 167, 128, 362, 512, 724),
    ("PG-19", True): (45, 32, 64, 181, 256, 362),
    ("PG-19 (gen)", False): (128, 181, 128, 362, 512, 724),
    ("PG-19 (gen)", True): (45, 32, 64, 181, 362, 362),
}
TABLE_3_NATS = {
    ("Random", False): (
        (507.5, 105.9), (377.1, 133.1), (470.7, 103.1),
        (1551.3, 159.5), (2193.4, 190.2), (2974.4, 298.3),
    ),
    ("Random", True): (
        (247.9, 32.0), (91.1, 30.8), (231.0, 37.9),
        (947.7, 155.0), (1292.2, 217.4), (1309.4, 234.6),
    ),
    ("Fanfics", False): (
        (358.9, 73.3), (395.4, 97.8), (261.0, 56.4),
        (1107.6, 129.1), (1408.4, 179.5), (1763.3, 280.2),
    ),
    ("Fanfics", True): (
        (145.0, 26.2), (82.3, 28.1), (147.9, 29.7),
        (576.4, 90.4), (835.9, 121.7), (1112.8, 168.6),
    ),
    ("PG-19", False): (
        (388.4, 66.4), (408.8, 96.3), (298.4, 77.4),
        (993.8, 183.4), (1346.0, 218.4), (1659.8, 344.5),
    ),
    ("PG-19", True): (
        (156.0, 33.9), (88.1, 30.3), (156.0, 30.2),
        (456.5, 56.5), (826.1, 117.6), (832.3, 171.0),
    ),
    ("PG-19 (gen)", False): (
        (354.1, 72.0), (379.2, 82.6), (277.6, 71.3),
        (927.3, 103.4), (1266.6, 125.9), (1653.1, 211.4),
    ),
    ("PG-19 (gen)", True): (
        (153.0, 17.8), (106.9, 38.5), (197.1, 39.3),
        (478.7, 85.7), (788.6, 130.8), (771.7, 143.0),
    ),
}  # fmt: skip

# Table 4 (v2): seconds to fit one text on an A100 or H100. {model: {N: seconds}}
TABLE_4 = {
    "Pythia-160M": {32: 6, 64: 25, 128: 68},
    "Pythia-410M": {32: 10, 64: 21, 128: 106},
    "Pythia-1.4B": {32: 10, 64: 66, 128: 129},
    "Llama-3.2-1B": {32: 11, 64: 15, 128: 27, 256: 87},
    "Llama-3.2-3B": {32: 14, 64: 18, 128: 28, 256: 78, 512: 261},
    "Llama-3.1-8B": {32: 16, 64: 20, 128: 29, 256: 60, 512: 215},
}

FIGURE_3_RATIO = 279  # one forward over autoregressive, tokens/s ("on average" v1, "up to" v2)
FIGURE_6_RATIO = 1.2  # the greatest length of a curve over that of its straight segment

# Kuratov et al.: largest N whose mean teacher-forced accuracy is at least 0.99, PG-19, one [mem].
KURATOV_MAX_TOKENS = {
    "P-160M": 80, "P-410M": 96, "P-1.4B": 160, "L-3.2-1B": 512, "L-3.2-3B": 1024, "L-3.1-8B": 1568,
}  # fmt: skip
