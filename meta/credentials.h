/* Credentials: user, password and certificates for a metadata service, from a file that only its owner can read.
 *
 * The file has lines `user=`, `password=`, `ca=`, `cert=`, `key=` (paths of PEM files); blank lines and lines that begin
 * with '#' are skipped. What an error says never contains a value of the file. Any thread. */
#ifndef P2PFS_META_CREDENTIALS_H
#define P2PFS_META_CREDENTIALS_H

struct credentials {
    char *user; /* owned, NULL: not given; as all below */
    char *password;
    char *ca;
    char *cert;
    char *key;
};

/* Reads the file; NULL gives empty credentials. Clear them also after a failure. 0; -EACCES others can read it; -EINVAL
 * a line is not understood; another errno of open(2). The sentence for the user goes to meta_open_error. */
int credentials_load(const char *file, struct credentials *out);
/* Replaces the password by a copy. -ENOMEM. */
int credentials_password_set(struct credentials *credentials, const char *password);
/* Overwrites the secrets before it frees them. */
void credentials_clear(struct credentials *credentials);

/* -EACCES, with a sentence in meta_open_error, when the URL's authority carries a password ("user:password@"). */
int credentials_url_check(const char *url);

#endif
