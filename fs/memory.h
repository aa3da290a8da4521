/* Memory: how much this process may use. */
#ifndef P2PFS_FS_MEMORY_H
#define P2PFS_FS_MEMORY_H

#include <stdint.h>

/* Bytes: what the machine has, or what the process's control groups allow when that is less. */
uint64_t memory_limit(void);

#endif
