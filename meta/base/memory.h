/* Memory: how much this process may use. Any thread; reads /proc and the control groups' files anew. */
#ifndef P2PFS_META_BASE_MEMORY_H
#define P2PFS_META_BASE_MEMORY_H

#include <stdint.h>

/* Bytes: what the machine has, or what the process's control groups allow when that is less. */
uint64_t memory_limit(void);
/* Bytes that may still be taken: MemAvailable, or what is left of a control group's limit when that is less (the
 * page cache of its processes counts as taken there). */
uint64_t memory_available(void);

#endif
