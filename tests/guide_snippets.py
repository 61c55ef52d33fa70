"""The code blocks of the I/O guide, as they stand there; `nexus_final` is an older name of ours."""

# ruff: noqa: E501

from __future__ import annotations

__all__ = ["SNIPPETS"]

SNIPPETS: dict[str, str] = {}

SNIPPETS["caching"] = """\
from nexus_final.sli.layer_cache import LayerCache

# Initialize cache
cache = LayerCache(
    cache_dir="~/.cache/nexus/layers",
    max_cache_size_gb=50.0,
    max_memory_cache_size_gb=2.0
)

# Cache automatically checked before downloading
layer = cache.get_layer("model", layer_idx)
if layer is None:
    # Download and cache
    layer = download_from_hub(model_id, layer_idx)
    cache.cache_layer("model", layer_idx, layer)
"""

SNIPPETS["prefetching"] = """\
from nexus_final.sli.io_optimizer import IOOptimizer

# Initialize optimizer
optimizer = IOOptimizer(
    layer_cache=cache,
    enable_prefetch=True,
    prefetch_lookahead=2
)

# During inference
for i in range(num_layers):
    # Get current layer (from cache or disk)
    layer = optimizer.get_layer_with_prefetch(
        model_id, i, num_layers
    )

    # Compute while next layers are being fetched
    output = layer(output)
"""

SNIPPETS["downloads"] = """\
from nexus_final.sli.io_optimizer import ParallelDownloader

downloader = ParallelDownloader(max_connections=8)

# Download layers 0-7 in parallel
urls = [(f"{base_url}/layer_{i}.pt", f"local_layer_{i}.pt")
        for i in range(8)]
results = downloader.download_layers_parallel(urls)
"""

SNIPPETS["quantization"] = """\
from nexus_final.sli.quantization import quantize_layer, get_nf4_config

# Apply 4-bit quantization (4x smaller)
config = get_nf4_config()
layer = quantize_layer(layer, mode="nf4")

# Save quantized layer (1/4 the size)
torch.save(layer, "layer_quantized.pt")  # 500MB instead of 2GB
"""

SNIPPETS["overlap"] = """\
from nexus_final.sli.io_optimizer import ComputeIOOverlap

# Start pipeline
overlap = ComputeIOOverlap(prefetcher, pipeline_depth=2)
overlap.start_pipeline(model_id, start_layer=0)

# Process layers
while True:
    # Blocks until layer is ready (may already be prefetched)
    layer = overlap.get_next_layer(model_id)
    if layer is None:
        break

    # Compute
    output = layer(output)
"""

SNIPPETS["wear_leveling"] = """\
from nexus_final.sli.io_optimizer import SSDWearLeveling

wear_leveling = SSDWearLeveling(
    cache_dir="~/.cache/nexus",
    num_zones=4
)

# Get write zone for balanced wear
zone = wear_leveling.get_write_zone()
cache_path = zone / f"layer_{id}.pt"
"""

SNIPPETS["high_performance"] = """\
# Maximum performance with local NVMe SSD
cache = LayerCache(
    cache_dir="/nvme/nexus_cache",  # Fast NVMe drive
    max_cache_size_gb=100.0,
    max_memory_cache_size_gb=8.0
)

optimizer = IOOptimizer(
    layer_cache=cache,
    enable_prefetch=True,
    prefetch_lookahead=3,  # Aggressive prefetch
    enable_wear_leveling=False  # Not needed for high-endurance NVMe
)
"""

SNIPPETS["network_constrained"] = """\
# Optimized for downloading from HuggingFace Hub
cache = LayerCache(
    cache_dir="~/.cache/nexus/layers",
    max_cache_size_gb=200.0,  # Large cache to avoid re-downloads
    max_memory_cache_size_gb=4.0
)

optimizer = IOOptimizer(
    layer_cache=cache,
    enable_prefetch=True,
    enable_parallel_download=True,
    max_concurrent_downloads=8,  # Maximize bandwidth
    prefetch_lookahead=5  # Download ahead aggressively
)
"""

SNIPPETS["memory_constrained"] = """\
# For systems with limited RAM
cache = LayerCache(
    max_cache_size_gb=500.0,
    max_memory_cache_size_gb=0.5  # Minimal memory cache
)

# Use quantization to reduce I/O size
from nexus_final.sli.quantization import get_nf4_config
config = get_nf4_config()
"""

SNIPPETS["monitoring"] = """\
# Get I/O statistics
stats = optimizer.get_stats()
print(f"Cache hit ratio: {stats['prefetcher']['cache_hits'] / stats['prefetcher']['total_requests']:.1%}")
print(f"Avg latency: {stats['prefetcher']['avg_latency_ms']:.2f}ms")
print(f"Active downloads: {stats['downloader']['active_downloads']}")
"""
