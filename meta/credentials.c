#include "meta/credentials.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "meta/base/util.h"
#include "meta/meta.h"

#define CREDENTIALS_MAX 65536 /* bytes of the file */

struct credentials_field {
    const char *word;
    size_t offset; /* of the char * in struct credentials */
};
static const struct credentials_field *credentials_field_at(size_t i);

static char **credentials_place(struct credentials *c, const struct credentials_field *field)
{
    return (char **)((char *)c + field->offset);
}

static void credentials_wipe(char **text)
{
    if (*text)
        explicit_bzero(*text, strlen(*text));
    free(*text);
    *text = NULL;
}

void credentials_clear(struct credentials *c)
{
    const struct credentials_field *field;
    for (size_t i = 0; (field = credentials_field_at(i)); i++)
        credentials_wipe(credentials_place(c, field));
}

int credentials_password_set(struct credentials *c, const char *password)
{
    credentials_wipe(&c->password);
    c->password = strdup(password);
    return c->password ? 0 : -ENOMEM;
}

static int credentials_line(const char *file, unsigned number, const char *line,
                            struct credentials *out)
{
    const char *equals = strchr(line, '=');
    size_t length = equals ? (size_t)(equals - line) : 0;
    const struct credentials_field *field;
    if (line[0] == '\0' || line[0] == '#')
        return 0;
    for (size_t i = 0; length > 0 && (field = credentials_field_at(i)); i++) {
        if (strlen(field->word) != length || strncmp(field->word, line, length) != 0)
            continue;
        char **place = credentials_place(out, field);
        credentials_wipe(place);
        *place = strdup(equals + 1);
        return *place ? 0 : -ENOMEM;
    }
    meta_open_error("%s, line %u: write user=, password=, ca=, cert= or key= at its beginning",
                    file, number);
    return -EINVAL;
}

/* Opens the file unless others than its owner can read or change it. */
static int credentials_open(const char *file, int *fd)
{
    struct stat st;
    *fd = open(file, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (*fd < 0 || fstat(*fd, &st) < 0) {
        int rc = -errno;
        meta_open_error("credentials file %s: %s", file, strerror(-rc));
        return rc;
    }
    if (!S_ISREG(st.st_mode)) {
        meta_open_error("credentials file %s is not a regular file", file);
        return -EINVAL;
    }
    if (st.st_mode & (S_IRWXG | S_IRWXO)) {
        meta_open_error("credentials file %s has mode %03o: others could use it; chmod 600 %s",
                        file, (unsigned)st.st_mode & 0777, file);
        return -EACCES;
    }
    return 0;
}

static int credentials_read(const char *file, int fd, char text[CREDENTIALS_MAX])
{
    size_t used = 0;
    while (used < CREDENTIALS_MAX) {
        ssize_t got = read(fd, text + used, CREDENTIALS_MAX - used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int rc = -errno;
            meta_open_error("credentials file %s: %s", file, strerror(-rc));
            return rc;
        }
        if (got == 0)
            break;
        used += (size_t)got;
    }
    if (used == CREDENTIALS_MAX || memchr(text, '\0', used)) {
        meta_open_error("%s is no credentials file: it holds a NUL or is too long", file);
        return -EINVAL;
    }
    text[used] = '\0';
    return 0;
}

int credentials_load(const char *file, struct credentials *out)
{
    *out = (struct credentials){0};
    if (!file)
        return 0;
    util_autoclose int fd = -1;
    int rc = credentials_open(file, &fd);
    if (rc < 0)
        return rc;
    char *text = malloc(CREDENTIALS_MAX);
    if (!text)
        return -ENOMEM;
    rc = credentials_read(file, fd, text);
    unsigned number = 1;
    for (char *line = text; rc == 0 && line; number++) {
        char *next = strchr(line, '\n');
        if (next)
            *next++ = '\0';
        size_t length = strlen(line);
        if (length > 0 && line[length - 1] == '\r')
            line[length - 1] = '\0';
        rc = credentials_line(file, number, line, out);
        line = next;
    }
    explicit_bzero(text, CREDENTIALS_MAX);
    free(text);
    return rc;
}

int credentials_url_check(const char *url)
{
    const char *authority = strstr(url, "://");
    authority = authority ? authority + 3 : url;
    size_t length = strcspn(authority, "/?#");
    const char *at = memrchr(authority, '@', length);
    /* a password may itself hold '/' or '?': then what stands before it already betrays it */
    if (!at)
        at = strchr(authority, '@');
    if (!at || !memchr(authority, ':', (size_t)(at - authority)))
        return 0;
    meta_open_error("a password must not stand in the metadata URL, where everybody can read it; "
                    "put user= and password= into a file of mode 600 and give "
                    "-o credentials=FILE");
    return -EACCES;
}

static const struct credentials_field credentials_fields[] = {
    {"user", offsetof(struct credentials, user)},
    {"password", offsetof(struct credentials, password)},
    {"ca", offsetof(struct credentials, ca)},
    {"cert", offsetof(struct credentials, cert)},
    {"key", offsetof(struct credentials, key)},
};

static const struct credentials_field *credentials_field_at(size_t i)
{
    return i < util_count(credentials_fields) ? &credentials_fields[i] : NULL;
}
