/* What of our object can be called from outside. */
#ifndef FEWSTEP_EXPORT_H
#define FEWSTEP_EXPORT_H

#define FEWSTEP_EXPORT __attribute__((visibility("default")))

#endif
