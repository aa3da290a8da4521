#include "fs/opened.h"

#include <utlist.h>

void opened_add(struct house *house, struct opened *opened)
{
    pthread_mutex_lock(&house->opened_lock);
    DL_APPEND(house->opened, opened);
    pthread_mutex_unlock(&house->opened_lock);
}

void opened_remove(struct house *house, struct opened *opened)
{
    pthread_mutex_lock(&house->opened_lock);
    DL_DELETE(house->opened, opened);
    pthread_mutex_unlock(&house->opened_lock);
}

void opened_close(struct house *house)
{
    while (house->opened != NULL)
        house->opened->drop(house, house->opened);
}
