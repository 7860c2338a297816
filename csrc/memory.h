#pragma once

#include <cstddef>

namespace rf {

// Ask for 2 MiB pages behind a large, still untouched result. A fresh 32 MiB array has 8192 small pages, and the
// faults of its first write take several times as long as the writing; with large ones they do not matter.
// Does nothing for small arrays and where the system has no such pages.
void prefer_large_pages(void* begin, std::size_t bytes);

}  // namespace rf
