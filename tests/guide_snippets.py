"""The code blocks and the statements of the I/O guide, as they stand there; `nexus_final` is an older
name of ours.
"""

# ruff: noqa: E501

from __future__ import annotations

__all__ = ["CLAIMS", "SNIPPETS"]

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

# Statements, without list marks and emphasis; cells of a table are parted by dots.
CLAIMS = [
    "I/O (Input/Output) operations are a critical bottleneck in Selective Layer Inference (SLI) systems. When working with large language models that don't fit in GPU memory, layers must be loaded from disk or network storage on-demand, which can significantly impact inference latency.",
    "Layer Loading Latency: Loading a single transformer layer (500MB-2GB) from SSD takes 50-200ms",
    "Sequential Dependencies: Layers must be loaded sequentially for forward pass",
    "Cache Misses: Without caching, every layer access requires disk I/O",
    "Network Latency: Downloading from HuggingFace Hub adds 1-10 seconds per layer",
    "SSD Wear: Repeated writes to the same SSD blocks degrade performance",
    "RAM to GPU · 1-5 ms · Negligible",
    "SSD to RAM · 50-200 ms · Moderate",
    "Network Download · 1-10 s · Severe",
    "Sequential Load (32 layers) · 1.6-6.4 s · Critical",
    "Our intelligent caching system minimizes redundant I/O",
    "LRU (Least Recently Used) eviction policy",
    "Two-tier caching (memory + SSD)",
    "Checksum validation for integrity",
    "Persistent metadata across restarts",
    "Cache hit/miss statistics",
    "First access: 1-10s (download + cache)",
    "Subsequent access: 50-200ms (SSD) or 1-5ms (memory)",
    "Hit ratio typically 80-95% in production",
    "Pre-fetch layers while the GPU is computing on the current layer",
    "GPU computes on layer N",
    "CPU pre-fetches layers N+1, N+2 in parallel",
    "Next layer is ready when GPU needs it",
    "Overlaps compute with I/O",
    "Reduces effective latency to max(compute_time, io_time)",
    "Typically 2-3x speedup for I/O-bound inference",
    "Download multiple layers simultaneously",
    "Utilizes full network bandwidth",
    "Reduces total download time",
    "Connection reuse for efficiency",
    "Smaller layers load faster from disk/network",
    "INT8: 2x size reduction, minimal accuracy loss",
    "NF4: 4x size reduction, good accuracy",
    "Mixed precision: Different precision for attention vs FFN",
    "2-4x faster disk reads",
    "2-4x faster network downloads",
    "Small de-quantization overhead on GPU",
    "Use a pipeline to overlap computation and I/O",
    "Stage 1: Load layer N+1 while computing layer N",
    "Stage 2: Load layer N+2 while computing layer N+1",
    "Stage 3: Keep 2 layers ahead in the prefetch queue",
    "Distribute writes across the SSD for longevity",
    "Extends SSD lifespan",
    "Prevents performance degradation",
    "Maintains consistent write speeds",
    "High-Performance Setup (Local SSD)",
    "Network-Constrained Setup",
    "Memory-Constrained Setup",
    "Monitor I/O performance with built-in statistics",
    "Cache Hit Ratio · >85% · Percentage of layer requests served from cache",
    "Avg Load Latency · <100ms · Average time to load a layer",
    "Prefetch Hit Rate · >70% · Layers used after being prefetched",
    "Queue Depth · 2-4 · Number of pending I/O operations",
    "Allocate 2-3x the model size for cache",
    "Use fast NVMe SSD if available",
    "Monitor cache hit ratio and adjust size",
    "`prefetch_lookahead=2` for balanced I/O",
    "`prefetch_lookahead=3-5` for network-constrained",
    "Disable if memory is extremely limited",
    "Use NF4 for maximum I/O speed (4x reduction)",
    "Use INT8 for better accuracy (2x reduction)",
    "Consider mixed precision for critical layers",
    "Use parallel downloads (4-8 connections)",
    "Enable HTTP/2 if available",
    "Consider local cache proxy for multiple users",
    "Symptoms: High disk I/O, slow inference",
    "Increase `max_cache_size_gb`",
    "Check cache directory has sufficient disk space",
    "Verify LRU eviction is working (check logs)",
    "Symptoms: Slow layer loading despite caching",
    "Check disk health (`smartctl`)",
    "Move cache to faster drive (NVMe > SSD > HDD)",
    "Enable quantization for smaller files",
    "Symptoms: System swapping, OOM errors",
    "Reduce `max_memory_cache_size_gb`",
    "Use smaller `prefetch_lookahead`",
    "Disable in-memory caching entirely",
    "Tiered Storage: Automatic migration between NVMe/SSD/HDD",
    "Compression: Layer-wise compression for network transfer",
    "Predictive Prefetching: ML-based prediction of layer access patterns",
    "Distributed Caching: Shared cache across multiple GPUs/nodes",
    "Direct Storage: GPU Direct Storage (GDS) for zero-copy loading",
]
